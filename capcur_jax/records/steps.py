"""The records of a run's steps and evaluations: metrics.jsonl, the sinks and the progress bar."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax

from capcur_jax.records import alarms, metrics
from capcur_jax.records.display import Display
from capcur_jax.records.jsonl import JsonLines, Nowhere, read_jsonl
from capcur_jax.records.sinks import Sinks


class _Pending(NamedTuple):
    """A step whose update may still run on the devices."""

    record: dict[str, Any]
    updates: Sequence[Mapping[str, Any]]
    skipped: int  # updates left out in the stages before
    timer: metrics.PhaseTimer
    dispatched: float  # when its update was, time.perf_counter()
    done: Future[float]  # when it was done


_Dispatched = tuple[Sequence[Mapping[str, Any]], Future[float]]


class StepRecorder:
    """Completes and writes the record of a step when the next one has been drawn: nothing waits for the devices.

    A waiting thread notes when an update was done, so that the seconds of a phase are its own although the next step's
    host work ran beside it. It is a daemon: whoever presses Ctrl-C twice does not wait for an update that hangs. A
    context manager.

    Args:
        file: metrics.jsonl; what it holds already are the records of the run that goes on here.
        combined: turns an update batch's fetched metrics into the record's values.
        owner: whether this process writes; the others keep what they need in memory.
        alarmed: told the name and the text of an alarm (alarms.py) that a step raised.

    Attributes:
        idle: complete steps of this stage, in a row up to the last, whose every update was left out.
    """

    def __init__(
        self,
        file: Path,
        combined: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
        counter: metrics.CompilationCounter,
        display: Display,
        sinks: Sinks | None = None,
        owner: bool = True,
        alarmed: Callable[[str, str], None] = lambda name, text: None,
    ):
        earlier = read_jsonl(file) if file.exists() else []
        self.steps = [record for record in earlier if record["type"] == "step"]
        self.evaluations = [record for record in earlier if record["type"] == "evaluation"]
        self.validations = [record for record in earlier if record["type"] == "validation"]
        self._alarmed = alarmed
        self._lines = JsonLines(file) if owner else Nowhere()
        self._combined, self._counter, self._display, self._sinks = combined, counter, display, sinks
        self._dispatched: queue.SimpleQueue[_Dispatched | None] = queue.SimpleQueue()
        threading.Thread(target=_note_ends, args=(self._dispatched,), name="update", daemon=True).start()
        self._pending: _Pending | None = None
        self._between: dict[str, float] = {}
        self.begin_stage()

    def __enter__(self) -> StepRecorder:
        return self

    def __exit__(self, *exception) -> None:
        self._dispatched.put(None)
        self._lines.close()

    @property
    def skipped(self) -> int:
        """Updates left out so far, of the whole run."""
        return self.steps[-1]["skipped_updates"] if self.steps else 0

    def write(self, record: Mapping[str, Any]) -> None:
        """A record of any type, as it is."""
        if record["type"] == "validation":
            self.validations.append(record)
        self._lines.write(record)
        if self._sinks:
            self._sinks.write(record)

    def evaluation(self, records: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Accuracy of every capability at one moment, in the order of the configuration."""
        for record in records:
            self.write({**record, "seconds_all": seconds})
        self.evaluations += records
        self._display.evaluation(records)

    # ------------------------------------------------------------------ steps

    def begin_stage(self) -> None:
        """A stage begins to step: what came before is no part of its first step."""
        self._compiled, self._ended, self.idle = self._counter.count, time.perf_counter(), 0

    def put(
        self,
        record: dict[str, Any],
        updates: Sequence[Mapping[str, Any]],
        skipped: int,
        timer: metrics.PhaseTimer,
        dispatched: float,
    ) -> None:
        """A step whose updates were dispatched at `dispatched` (time.perf_counter()); `skipped`: updates that were left
        out in the stages before."""
        self.complete()
        record["compilations"] = self._counter.count - self._compiled
        self._compiled = self._counter.count
        self._pending = _Pending(record, updates, skipped, timer, dispatched, Future())
        self._dispatched.put((updates, self._pending.done))

    @contextlib.contextmanager
    def between(self, name: str) -> Iterator[None]:
        """Seconds of what comes between two steps, for the next record."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._between[name] = self._between.get(name, 0.0) + time.perf_counter() - start

    def complete(self) -> None:
        """Writes what is pending."""
        if self._pending is None:
            return
        (record, updates, skipped, timer, dispatched, done), self._pending = self._pending, None
        values, done = self._combined(jax.device_get(updates)), done.result()
        seconds = dict(timer.seconds)
        if "rollout" in seconds:  # it began with waiting for the update of the step before
            seconds["rollout"] -= max(0.0, self._ended - timer.starts["rollout"])
        seconds["update"] = done - dispatched
        total, self._ended = done - self._ended, done
        left_out = skipped + values["skipped_updates"]  # of the whole run
        self.idle = self.idle + 1 if left_out - self.skipped >= len(updates) else 0
        record |= values | {"skipped_updates": left_out, "seconds": total}
        record |= {f"seconds_{phase}": value for phase, value in seconds.items()} | self._between
        record["tokens_per_second"] = record["trained_tokens"] / max(total - sum(self._between.values()), 1e-9)
        self._between.clear()
        record |= metrics.device_memory()
        self.steps.append(record)
        if found := alarms.raised(self.steps):
            record["alarms"] = found
        self.write(record)
        self._display.step(record)
        for name, text in found.items():
            self._alarmed(name, text)


def _note_ends(dispatched: queue.SimpleQueue[_Dispatched | None]) -> None:
    """Gives each future the moment when its updates were done, or what went wrong; None is the end."""
    while (waiting := dispatched.get()) is not None:
        updates, done = waiting
        try:
            jax.block_until_ready(updates)
        except Exception as error:  # the step's record is completed with it
            done.set_exception(error)
        else:
            done.set_result(time.perf_counter())
