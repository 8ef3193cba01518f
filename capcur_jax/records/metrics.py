"""What records are made of: accuracies, phase seconds, device memory, compilation counts and versions.

Nothing here imports jax at module level, so that tools that only read a work directory start at once.
"""

import collections
import contextlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy", "capcur_jax")


def accuracy_of(evaluations: Iterable[Mapping[str, Any]], key: str = "accuracy") -> dict[str, dict[str, float | None]]:
    """Evaluation records, in order, as summary.json's `accuracy`: capability -> moment -> share of right answers.

    Moments are "base", "after_<stage>" and "final", a capability's last evaluation after a stage. `key`: what is taken
    of a record; also `accuracy_answered`, or the number `left_out`.
    """
    accuracy: dict[str, dict[str, float | None]] = {}
    for record in evaluations:
        values = accuracy.setdefault(str(record["capability"]), {})
        values.pop("final", None)  # stays the last key
        values[moment_of(record)] = record.get(key)
        if moment_of(record) != "base":
            values["final"] = record.get(key)
    return accuracy


def moment_of(evaluation: Mapping[str, Any]) -> str:
    """The moment of an evaluation record: "base" or "after_<stage>"."""
    return "base" if evaluation.get("after") == "base" else f"after_{evaluation.get('after')}"


class PhaseTimer:
    """Wall seconds of named phases: `with timer("rollout"): ...`. Times of the same name add up until `reset()`.

    A profiler's trace (`--profile`) shows the phases by their names.

    JAX returns before the device is done: block on (or fetch) the results inside the phase that computes them.

    Attributes:
      seconds: dict from phase to seconds since the last `reset()`, in order of first use.
      starts: dict from phase to when it first began since then (time.perf_counter()).
    """

    def __init__(self):
        self.reset()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        from jax.profiler import TraceAnnotation  # here, so that readers of records need no jax

        start = time.perf_counter()
        self.starts.setdefault(phase, start)
        try:
            with TraceAnnotation(phase):
                yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def reset(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)  # new ones: the caller may keep the old
        self.starts: dict[str, float] = {}


def device_memory() -> dict[str, float]:
    """Memory for a step record, in GiB: the local devices' maxima, and what this process holds of the host's.

    `device_gib` (now), `device_peak_gib` (since the start), `device_limit_gib`: each where the devices report it, which
    CPU devices don't; and `host_rss_gib`.
    """
    import jax
    import psutil

    found = {"host_rss_gib": psutil.Process().memory_info().rss / 2**30}
    reports = [device.memory_stats() or {} for device in jax.local_devices()]
    for name, key in (
        ("device", "bytes_in_use"),
        ("device_peak", "peak_bytes_in_use"),
        ("device_limit", "bytes_limit"),
    ):
        values = [report[key] for report in reports if key in report]
        if values:
            found[f"{name}_gib"] = max(values) / 2**30
    return found


class CompilationCounter:
    """Counts the executables that XLA makes in this process from now on, by jax.monitoring.

    An executable read from the persistent compilation cache counts too: it is a new shape or program all the same, and
    "no compilation after warm-up" must not depend on what an earlier run left on the disk.

    Attributes:
      count: executables made, compiled or read from the cache.
    """

    def __init__(self):
        import jax.monitoring  # here, so that readers of records need no jax

        self._monitoring = jax.monitoring
        self._lock = threading.Lock()  # a program may be compiled in another thread
        self._open = True
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def _on_duration(self, event: str, duration: float, **unused) -> None:
        with self._lock:
            if event == _COMPILE_EVENT:
                self.count += 1

    def close(self) -> None:
        """Stops counting."""
        if self._open:
            self._monitoring.unregister_event_duration_listener(self._on_duration)
            self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def versions() -> dict[str, Any]:
    """What a run was made with: python, platform, package versions (None: not installed), git commit and `dirty`.

    `commit` and `dirty` are None where this source isn't tracked by a git checkout; `dirty` says whether the package or
    the configs differ from the commit (files that git doesn't know included).
    """
    result: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = None
    package_dir = pathlib.Path(__file__).resolve().parents[1]
    # Asks for this very file: an environment inside somebody's checkout must not report that checkout's commit.
    tracked = _git(package_dir, "ls-files", "--error-unmatch", os.path.abspath(__file__))
    commit = _git(package_dir, "rev-parse", "HEAD") if tracked else None
    result["commit"] = commit or None
    result["dirty"] = bool(_git(package_dir, "status", "--porcelain", "--", ".", "../configs")) if commit else None
    return result


def _git(directory: pathlib.Path, *arguments: str) -> str | None:
    """Output of a git command in `directory`, or None where git is missing or fails."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
