"""Where a run's records go besides metrics.jsonl: TensorBoard event files and Weights & Biases.

Both get the same tags: train/reward, rollout/length, time/update, eval/perception/accuracy. Of records only finite
numbers go out. Of sampled groups (samples.py) they get image, question, responses and rewards.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from capcur_jax.errors import InputError
from capcur_jax.records import samples
from capcur_jax.records.jsonl import to_jsonable
from capcur_jax.records.samples import Group

# Beginning of a step record's key -> beginning of its tag; the first that fits counts. Anything else is train/<key>.
_TAGS = (
    ("seconds_", "time/"),
    ("seconds", "time/step"),
    ("tokens_per_second", "time/tokens_per_second"),
    ("response_length", "rollout/length"),
    ("truncated", "rollout/truncated"),
    ("equal_groups", "rollout/equal_groups"),
    ("logprob_difference", "rollout/logprob_difference"),
    ("token_padding", "batch/token_padding"),
    ("patch_padding", "batch/patch_padding"),
    ("compilations", "system/compilations"),
    ("device_", "system/device_"),
    ("host_", "system/host_"),
)
_NOT_SHOWN = {"step", "stage_step"}
_OF_STEPS = {"train", *(tag.partition("/")[0] for _, tag in _TAGS)}


class Tracker(Protocol):
    """What shows a run elsewhere. It may raise anything; see `Sinks`."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, or of an evaluation after it, by tag."""

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Groups that were sampled for a step."""

    def close(self) -> None:
        """The run is over."""


class Sinks:
    """Sends records on; after a failure in the middle of a run it warns once, counts and goes on.

    Args:
      workdir: gets tensorboard/, wandb/ and wandb_id.txt.
      tensorboard: whether to write event files.
      wandb: project name; "" for no Weights & Biases.
      config: the run's config, for W&B.
      resume_step: steps done in the checkpoint that the run goes on from. TensorBoard drops what it had of later steps;
        W&B keeps it, and isn't told those steps again.
      warn: shows a line to the user.

    Attributes:
      failures: sink -> records that it didn't take.

    Raises:
      InputError: W&B is asked for and isn't installed or doesn't start, or the event file can't be made.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        tensorboard: bool,
        wandb: str,
        config: Mapping[str, Any],
        resume_step: int = 0,
        warn: Callable[[str], None] = logging.warning,
    ):
        workdir = Path(workdir)
        self._warn = warn
        self._sinks: dict[str, Tracker] = {}
        self.failures: dict[str, int] = {}
        if wandb:  # first: it is what can fail
            self._sinks["W&B"] = _WandB(workdir, wandb, config)
        if tensorboard:
            self._sinks["TensorBoard"] = _TensorBoard(workdir, resume_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """One record as metrics.jsonl gets it; one that has no `step` or no number in it is left out."""
        step = record.get("step")
        values = scalars(record)
        if not values or not isinstance(step, numbers.Integral):
            return
        for name, sink in self._sinks.items():
            self._try(name, sink.write, int(step), values)

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Lines of rollouts.jsonl, of one step."""
        for name, sink in self._sinks.items() if groups else ():
            self._try(name, sink.rollouts, step, groups)

    def close(self) -> None:
        for name, sink in self._sinks.items():
            self._try(name, sink.close)
        self._sinks = {}

    def _try(self, name: str, act: Callable[..., None], *arguments) -> None:
        try:
            act(*arguments)
        except Exception as error:  # a disk, a network, a service of somebody else: no reason to lose the run
            if name not in self.failures:
                self._warn(f"{name} didn't take a record ({type(error).__name__}: {error}); the run goes on without")
            self.failures[name] = self.failures.get(name, 0) + 1


# ---------------------------------------------------------------------- records to tags


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's finite numbers by tag, nested dicts flattened; the tag's first part is its group on the page."""
    kind = record.get("type", "step")
    found = {}
    for parts, value in _leaves(record):
        name = "/".join(re.sub(r"[^-\w.]", "_", part) for part in parts)  # other characters aren't allowed in a tag
        if parts[0] not in _NOT_SHOWN and math.isfinite(value):
            found[_step_tag(name) if kind == "step" else _group(kind, record) + name] = float(value)
    return found


def _leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Numbers of a nested dict, by path; numpy's and JAX's scalars too."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(key)))
        elif isinstance(value, numbers.Real) or (getattr(value, "ndim", None) == 0 and not isinstance(value, str)):
            yield (*path, str(key)), value


def _step_tag(name: str) -> str:
    for key, tag in _TAGS:
        if name.startswith(key):
            return tag + name[len(key) :]
    return f"train/{name}"


def _group(kind: str, record: Mapping[str, Any]) -> str:
    """eval/<capability>/ for an evaluation; another kind of record has a group of its own name."""
    capability = re.sub(r"[^-\w.]", "_", str(record.get("capability", "")))
    return ("eval" if kind == "evaluation" else kind) + "/" + (f"{capability}/" if capability else "")


# ---------------------------------------------------------------------- TensorBoard


class _TensorBoard:
    """An event file, written as the records come.

    tensorboardX's own writer hands records to a thread through a queue of ten; when a full disk ends that thread, the
    training loop waits at the queue for ever. So its protocol buffers and checksums are used, and its writer isn't.
    """

    def __init__(self, workdir: Path, resume_step: int):
        # Imported late: without TensorBoard nobody waits for it.
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import masked_crc32c

        self._Event, self._Summary, self._checksum = Event, Summary, masked_crc32c
        self._text, self._workdir = summary.text, workdir
        directory = workdir / "tensorboard"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # The name is TensorBoard's; it reads a directory's files in the order of their names.
            number = sum(1 for _ in directory.glob("events.out.tfevents.*"))
            name = f"events.out.tfevents.{int(time.time()):010d}.{number:05d}.{socket.gethostname()}"
            self._file = open(directory / name, "xb", buffering=1 << 20)  # noqa: SIM115 - open as long as the run
            self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
            if number:
                start = SessionLog(status=SessionLog.START)
                self._append(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        except OSError as error:
            raise InputError(f"{directory}: TensorBoard's event file can't be written: {error.strerror}") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._Summary(value=[self._Summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])
        self._append(self._Event(wall_time=time.time(), step=step, summary=summary))

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """A text and an image for each; the first group of every step has the same tag, and so on."""
        values = []
        for number, group in enumerate(groups, 1):
            values += self._text(f"rollouts/{number}", samples.described(group)).value
            if image := samples.picture(group, self._workdir):
                size = {"width": image.width, "height": image.height, "colorspace": 3}
                shown = self._Summary.Image(**size, encoded_image_string=samples.encoded(image))
                values.append(self._Summary.Value(tag=f"rollouts/{number}/image", image=shown))
        self._append(self._Event(wall_time=time.time(), step=step, summary=self._Summary(value=values)))

    def _append(self, event: Any) -> None:
        """One TFRecord, in one write: one that fails half-way would make the rest of the file unreadable."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        self._file.write(length + checksums[0] + data + checksums[1])
        self._file.flush()  # a killed run keeps what it wrote

    def close(self) -> None:
        self._file.close()


# ---------------------------------------------------------------------- Weights & Biases


class _WandB:
    """A W&B run; the same one again when the work directory is resumed."""

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise InputError(
                f"Weights & Biases is asked for (project '{project}') and isn't installed: "
                "pip install 'capcur_jax[wandb]'"
            ) from None
        self._wandb, self._workdir = wandb, workdir
        known = workdir / "wandb_id.txt"
        identity = known.read_text().strip() if known.exists() else ""
        identity = identity or uuid.uuid4().hex[:12]
        workdir.mkdir(parents=True, exist_ok=True)
        known.write_text(identity + "\n")
        try:
            self._run = wandb.init(
                project=project,
                id=identity,
                resume="allow",
                name=workdir.name,
                dir=str(workdir),
                config=to_jsonable(config, "config"),
            )
        except Exception as error:  # wandb.Error for the most part: not logged in, no network
            raise InputError(
                f"Weights & Biases (project '{project}') doesn't start: {error}; "
                "`wandb login` logs in, WANDB_MODE=offline keeps the records here for `wandb sync`"
            ) from error
        self._first = self._run.step  # 0, or the step after the last that W&B has
        self._axes: set[str] = set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        group = next(iter(values)).partition("/")[0]
        if group in _OF_STEPS:
            if step >= self._first:  # W&B does not take again the steps that it has
                self._run.log(dict(values), step=step)
            return
        self._beside(group, step, values, max(step, self._run.step))

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """A table, a row for each response. The step's own record is still to come: it opens the next row."""
        pictures = [samples.picture(group, self._workdir) for group in groups]
        images = [picture and self._wandb.Image(picture) for picture in pictures]
        table = self._wandb.Table(columns=list(samples.COLUMNS), data=samples.rows(groups, images))
        self._beside("rollouts", step, {"rollouts/samples": table}, self._run.step)

    def _beside(self, group: str, step: int, values: Mapping[str, Any], row: int) -> None:
        """On an axis of its own: an evaluation comes after its step went out, and may come again after a resume."""
        if group not in self._axes:
            self._axes.add(group)
            self._run.define_metric(f"{group}/step")
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self._run.log({**values, f"{group}/step": step}, step=row)

    def close(self) -> None:
        self._run.finish()
