"""--profile: a trace of chosen steps, to be opened at https://ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from capcur_jax.errors import InputError

TRACE = "perfetto_trace.json.gz"


class Profile:
    """Traces steps `steps` of a run; what fails in it is a warning and doesn't end the run.

    The trace shows the operations of GPUs and TPUs (of a CPU the calls only), each step, and what runs inside a
    `jax.profiler.TraceAnnotation`, as the phases of `metrics.PhaseTimer` do. A few steps are enough: the file grows by
    megabytes a step.

    Args:
      workdir: profile/perfetto_trace.json.gz goes there; with several processes, each has profile/process_<i>/.
      steps: "10-12" or "10", counted over the whole run from 1; "" traces nothing.
      warn: shows a line to the user.

    Attributes:
      trace: the file, once it is written.

    Raises:
      InputError: `steps` is something else.
    """

    def __init__(self, workdir: str | os.PathLike, steps: str, warn: Callable[[str], None] = logging.warning):
        self._first, self._last = _range(steps)
        self._directory = Path(workdir) / "profile"
        self._warn = warn
        self._running = False
        self._step = contextlib.ExitStack()
        self.trace: Path | None = None

    def before(self, step: int) -> None:
        """To be called before step `step` does anything."""
        if not self._first <= step <= self._last:
            return
        if not self._running:
            self._start()
        if self._running:
            self._step.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=step))

    def after(self, step: int) -> None:
        """To be called when step `step` has dispatched everything; waits for the devices if the step is traced."""
        if not self._running:
            return
        wait_for_devices()
        self._step.close()
        if step >= self._last:
            self._stop()

    def close(self) -> None:
        """Writes what there is of a trace, if the run ends inside the chosen steps."""
        self._step.close()
        if self._running:
            self._stop()

    def _start(self) -> None:
        wait_for_devices()  # what earlier steps left running is no part of this
        if jax.process_count() > 1 and self._directory.name == "profile":
            # JAX finds its own file by being alone in the folder.
            self._directory = self._directory / f"process_{jax.process_index()}"
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would drown the rest: a trace holds a million events
        with self._warning("start"):
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True, profiler_options=options)
            self._running = True

    def _stop(self) -> None:
        self._running = False
        with self._warning("write"):
            jax.profiler.stop_trace()
            # JAX puts it into a folder named by the time, beside the files for TensorBoard's profiler.
            latest = max(self._directory.glob(f"plugins/profile/*/{TRACE}"), key=lambda path: path.stat().st_mtime)
            self.trace = latest.replace(self._directory / TRACE)

    @contextlib.contextmanager
    def _warning(self, what: str):
        try:
            yield
        except Exception as error:  # a full disk, a profiler library that isn't there: no reason to lose the run
            self._last = 0
            self._warn(f"--profile couldn't {what} the trace in {self._directory} ({type(error).__name__}: {error})")


def wait_for_devices() -> None:
    """Returns when everything that was dispatched so far and whose result somebody holds is computed."""
    for array in jax.live_arrays():
        try:
            array.block_until_ready()
        except RuntimeError:
            if not array.is_deleted():  # donated meanwhile, by another thread
                raise


def _range(steps: str) -> tuple[int, int]:
    """First and last step; (1, 0), which no step is in, for ""."""
    if not steps:
        return 1, 0
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", steps)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise InputError(f"--profile={steps} isn't a step or a range of steps from 1; for example --profile=10-12")
    return first, last
