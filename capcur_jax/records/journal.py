"""What a long job has done so far: JSON lines, appended and synced one by one. A killed job goes on from there."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capcur_jax.errors import InputError

try:
    import fcntl
except ImportError:  # not a POSIX system: two jobs on one journal are not told apart there
    fcntl = None


def key_of(name: str, *content: object) -> str:
    """A journal's key: a row's id, and a digest of what the answer depends on besides the settings.

    A row that was changed under its old id is another one.
    """
    digest = hashlib.sha256("\x1f".join(map(str, content)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{name}#{digest}"


def digest_of(path: str) -> str:
    """The digest of a file's content, "" where it can't be read. A moved file keeps its digest, a changed or
    repaired one does not."""
    try:
        found = os.stat(path)
        return _digest(path, found.st_mtime_ns, found.st_size) if stat.S_ISREG(found.st_mode) else ""
    except (OSError, ValueError):
        return ""


@functools.lru_cache(maxsize=1 << 17)
def _digest(path: str, changed: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def fingerprint(directory: Path) -> str:
    """Of a checkpoint: its settings and tokenizer, and the sizes, beginnings, middles and ends of its weight files."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in ("*.json", "*.jinja", "*.safetensors") for file in directory.glob(pattern)):
        size, piece = file.stat().st_size, 1 << 20
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for start in sorted({0, max(0, size // 2 - piece // 2), max(0, size - piece)}):
                opened.seek(start)
                digest.update(opened.read(piece))
    return digest.hexdigest()[:16]


class Journal:
    """Records by key, on disk as soon as `add` returns. One process at a time.

    The first line holds the settings; each line after it {"key": ..., "record": ...}, of which the last one with a key
    counts. What a kill left of a last line is cut off.

    Args:
      path: the file, made where it is missing, with its folders.
      settings: JSON values that the records depend on.

    Attributes:
      done: the records, by key.

    Raises:
      InputError: the file holds records of other settings (names them), is no journal, or another process writes it.
        A journal of other settings without a record is begun anew.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any]):
        self.path = Path(path)
        self.done: dict[str, Any] = {}
        self._settings = json.loads(json.dumps(settings))  # as they will be read
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise InputError(f"{self.path}: can't be written ({error.strerror}); give another place") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def add(self, key: str, record: Any) -> None:
        """Keeps a record (a JSON value), on disk when this returns."""
        self._append({"key": key, "record": record})
        self.done[key] = record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _append(self, line: dict) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")  # ASCII: half of a surrogate pair can be written too
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is writing it; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks

    def _read(self) -> None:
        self._file.seek(0)
        header, whole = self._file.readline(), 0
        if header.endswith(b"\n"):
            other = self._other_settings(_object(header))
            whole = self._file.tell()
            for line in self._file:
                entry = _object(line)
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                # A line of another kind is what a machine's crash left in the middle: its key is not done.
                if entry and isinstance(entry.get("key"), str) and "record" in entry:
                    self.done[entry["key"]] = entry["record"]
            if other and self.done:
                raise InputError(
                    f"{self.path}: its answers came with other settings: {other}. Run with those of then, write to "
                    "another --output, or delete this file to begin anew"
                )
            whole = 0 if other else whole
        elif not b'{"settings": '.startswith(header[:13]):
            raise self._no_journal()
        self._file.truncate(whole)
        if not whole:
            self._append({"settings": self._settings})

    def _other_settings(self, header: dict | None) -> str:
        """Settings of the header that differ from this run's, in words."""
        if not header or not isinstance(header.get("settings"), dict):
            raise self._no_journal()
        theirs = header["settings"]
        names = [name for name in {**self._settings, **theirs} if theirs.get(name) != self._settings.get(name)]
        return ", ".join(f"{name} {_shown(theirs, name)}, now {_shown(self._settings, name)}" for name in names)

    def _no_journal(self) -> InputError:
        return InputError(
            f"{self.path}: in the place of the journal lies another file; move it, or choose another name"
        )


def _object(line: bytes) -> dict | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _shown(settings: Mapping[str, Any], name: str) -> str:
    text = json.dumps(settings[name], ensure_ascii=False) if name in settings else "(not set)"
    return text if len(text) <= 60 else text[:59] + "…"
