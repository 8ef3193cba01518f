"""Run records: JSON lines, phase seconds, compilation counts and versions.

Nothing here imports jax at module level, so that tools that only read a work directory start at once.
"""

import collections
import contextlib
import importlib.metadata
import json
import math
import numbers
import os
import pathlib
import platform
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

# An image as a data URI: never useful in a log, and a few of them make the log unreadable and huge.
_DATA_URI = re.compile(r"(data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,)[A-Za-z0-9+/=_-]{64,}")

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT_EVENT = "/jax/compilation_cache/cache_retrieval_time_sec"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy", "capcur_jax")


def to_jsonable(value: Any, where: str = "record") -> Any:
    """`value` as plain JSON types: numpy and jax scalars as numbers, NaN and infinities as None, data URIs cut.

    Raises:
      TypeError: for anything else (bytes, arrays, objects); the message names the key, `where` is its start.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _DATA_URI.sub(r"\1[omitted]", value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) or getattr(value, "ndim", None) == 0:  # numpy and jax scalars, bfloat16 among them
        if getattr(value, "dtype", None) is not None and value.dtype.kind in "biu":
            return value.item()
        value = float(value)
        return value if math.isfinite(value) else None
    raise TypeError(f"{where}: {type(value).__name__} can't be written as JSON; pass numbers, strings, lists or dicts")


def to_json(value: Any, **options) -> str:
    """Strict JSON text in ASCII, so that every line ending inside a string (U+2028 too) is escaped."""
    return json.dumps(to_jsonable(value), allow_nan=False, **options)


class JsonLines:
    """Appends one JSON object a line to `path`; each line is flushed, so that a killed run keeps its records.

    A last line that an earlier run left cut is removed first; without that the next record would be glued to it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_tail(self.path)
        self._file = open(self.path, "a", encoding="ascii", newline="\n")  # noqa: SIM115 - open as long as the run

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends `record`; see `to_jsonable` for what it may hold."""
        if not isinstance(record, Mapping):
            raise TypeError(f"{self.path}: a record is a dict, not {type(record).__name__}")
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


class Nowhere:
    """Stands for a record file in processes that write none."""

    def write(self, record: Mapping[str, Any]) -> None:
        pass


def _mend_tail(path: pathlib.Path) -> None:
    """Ends the file with a whole line: completes the last one, or drops it when it is no JSON."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start, tail = end, b""
        while start > 0 and b"\n" not in tail:
            start = max(0, start - 65536)
            file.seek(start)
            tail = file.read(end - start)
        line = tail[tail.rfind(b"\n") + 1 :]
        if not line:
            return
        try:
            json.loads(line)
            file.seek(end)
            file.write(b"\n")
        except ValueError:
            file.truncate(end - len(line))


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a JSON-lines file. A last line that is cut (a run killed while writing) is left out.

    Raises:
      FileNotFoundError: without the file.
      ValueError: a broken line elsewhere; names file and line.
    """
    path = pathlib.Path(path)
    lines = path.read_bytes().split(b"\n")  # not splitlines(), which also splits at characters inside strings
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            problem = "" if isinstance(record, dict) else f"a JSON object is wanted, not {type(record).__name__}"
        except ValueError as error:
            problem = str(error)
        if not problem:
            records.append(record)
        elif number < len(lines):  # a line ending follows, so it wasn't cut
            raise ValueError(f"{path}:{number}: not a record: {problem}; repair or delete this line")
    return records


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` as indented strict JSON; a reader sees the old file or the new one, never half of it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = to_json(obj, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: a rename across disks isn't atomic
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def accuracy_of(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Evaluation records, in order, as summary.json's `accuracy`: capability -> moment -> share of right answers.

    Moments are "base", "after_<stage>" and "final", a capability's last evaluation.
    """
    accuracy: dict[str, dict[str, float | None]] = {}
    for record in evaluations:
        values = accuracy.setdefault(str(record["capability"]), {})
        values.pop("final", None)  # stays the last key
        values[moment_of(record)] = values["final"] = record.get("accuracy")
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
      from_cache: those of them that the persistent cache held.
      seconds: wall seconds spent on all of them.
    """

    def __init__(self):
        import jax.monitoring  # here, so that readers of records need no jax

        self._monitoring = jax.monitoring
        self._lock = threading.Lock()  # a program may be compiled in another thread
        self._open = True
        self.count = 0
        self.from_cache = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def _on_duration(self, event: str, duration: float, **unused) -> None:
        with self._lock:
            if event == _COMPILE_EVENT:
                self.count += 1
                self.seconds += duration
            elif event == _CACHE_HIT_EVENT:
                self.from_cache += 1

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
