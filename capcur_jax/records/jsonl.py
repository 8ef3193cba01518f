"""JSON and JSON lines that a killed process leaves readable.

No JAX in here: tools that read a work directory start at once.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Self

from capcur_jax.files import write_atomically

# An image as a data URI: never useful in a log, and a few of them make the log unreadable and huge.
_DATA_URI = re.compile(r"(data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,)[A-Za-z0-9+/=_-]{64,}")


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


def plain(value: Any) -> Any:
    """As it comes back from a file; a copy."""
    return json.loads(to_json(value))


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

    def close(self) -> None:
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
    write_atomically(pathlib.Path(path), (to_json(obj, indent=2) + "\n").encode("ascii"))
