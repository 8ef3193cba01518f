"""What the readers of published data sets share: finding files, going through their rows, fields and images.

A reader is a module of this package with `read(directory, images) -> Iterator[Problem | Drop]`: one Problem or one
Drop for each published row, in the published order. NAMES has them all.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NamedTuple

from capcur_jax.data import golds, parquet
from capcur_jax.data.problem import BadRow, Drop, Problem, short, stable_hash
from capcur_jax.data.row_files import decoded
from capcur_jax.data.row_images import unpack_image
from capcur_jax.data.sources import json_stream, wording
from capcur_jax.errors import InputError

NAMES = (
    "docci", "pixmo_cap", "orz_math", "clevr_math", "geoqa170k", "math_puma", "docvqa", "arxivqa", "gsm8k",
    "visonlyqa", "mathvision",
)  # fmt: skip
_PARQUET_ROWS = 32  # that are held at a time; each may bring a page of 2 MB


class Record(NamedTuple):
    """One published row: its file, its number there from 1 (of a JSON lines file the line), and what it holds."""

    file: Path
    number: int
    value: Any  # a BadRow where it can't be read

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}" if _is_lines(self.file) else f"{self.file}, row {self.number}"


def reader(name: str) -> ModuleType:
    """The module that reads a published set."""
    if name not in NAMES:
        raise InputError(f"no reader of {name!r}; choose one of {', '.join(NAMES)}")
    return importlib.import_module(f"capcur_jax.data.sources.{name}")


# ---------------------------------------------------------------------- files


def find(directory: Path, patterns: Sequence[str], origin: str) -> list[Path]:
    """The files of a folder that patterns match, pattern by pattern.

    Args:
      origin: where one gets them, for the message.

    Raises:
      InputError: there are none.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; --input is the folder with the files of {origin}")
    files = {file: None for pattern in patterns for file in sorted(directory.glob(pattern)) if file.is_file()}
    if not files:
        raise InputError(f"{directory}: holds none of {', '.join(patterns)}; get them from {origin}")
    return list(files)


def records(file: Path, key: str = "") -> Iterator[Record]:
    """The rows of a file: JSON lines, a JSON list (or one under `key`), or Parquet, by its suffix.

    A .json file that holds one object after another is read as JSON lines.

    Raises:
      InputError: the file as a whole can't be read.
    """
    if file.suffix == ".parquet":
        for number, row in parquet.rows(file, _PARQUET_ROWS):
            values = row.values() if isinstance(row, dict) else ()
            yield Record(file, number, next((value for value in values if isinstance(value, BadRow)), row))
    elif _is_lines(file) or (not key and _starts_with_object(file)):
        yield from _lines(file)
    else:
        for number, value in json_stream.items(file, key):
            yield Record(file, number, value)


def all_records(files: Iterable[Path], key: str = "") -> Iterator[Record]:
    """The rows of several files, one after the other; see `records`."""
    for file in files:
        yield from records(file, key)


def problems(rows: Iterable[Record], convert: Callable[[Record], Problem]) -> Iterator[Problem | Drop]:
    """Rows -> problems. A row whose id was there before gets one of its own, unless it is the same row again.

    Args:
      convert: makes the problem of a row that is an object. Raises BadRow.
    """
    seen: dict[int, int] = {}  # hashes: a set has up to a million rows
    for record in rows:
        try:
            if isinstance(record.value, BadRow):
                raise record.value
            if not isinstance(record.value, dict):
                raise BadRow("not an object", f"a JSON {type(record.value).__name__} where an object belongs")
            yield _with_own_id(convert(record), seen)
        except BadRow as error:
            yield Drop(record.where, *error.args)


def _with_own_id(problem: Problem, seen: dict[int, int]) -> Problem:
    content = stable_hash(problem.problem, problem.answer, problem.response, problem.metadata.get("image_id"))
    row_id, turn = problem.id, 1
    while (key := stable_hash(row_id)) in seen:
        if seen[key] == content:
            raise BadRow("duplicate row", f"{short(row_id, 80)} is there twice, the same both times")
        turn += 1
        row_id = f"{problem.id}-{turn}"
    seen[key] = content
    return dataclasses.replace(problem, id=row_id)


def _is_lines(file: Path) -> bool:
    return file.suffix in (".jsonl", ".jsonlines")


def _starts_with_object(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _lines(file: Path) -> Iterator[Record]:
    # Bytes, split at \n only: text would also break at U+2028, and one bad byte would cost the whole file.
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                try:
                    yield Record(file, number, decoded(line))
                except BadRow as error:
                    yield Record(file, number, error)


# ---------------------------------------------------------------------- fields


def text(row: dict, key: str) -> str:
    """A text that must be there. Raises BadRow."""
    value = optional_text(row, key)
    if not value.strip():
        raise BadRow(f"no {key}", f"`{key}` is missing or empty")
    return value


def optional_text(row: dict, key: str) -> str:
    """A text, or a whole number or decimal as one; "" where it is missing or null. Raises BadRow."""
    return as_text(row.get(key), key)


def as_text(value: Any, key: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < 1e300:  # NaN too
            raise BadRow(f"bad {key}", f"`{key}` is no finite number")
        return str(int(value)) if value == int(value) else str(value)
    if not isinstance(value, str):
        raise BadRow(f"bad {key}", f"`{key}` is a {type(value).__name__} where a text belongs")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow("not UTF-8", f"`{key}` holds what is no Unicode text")
    return value


def texts(row: dict, key: str) -> list[str]:
    """A list of texts, [] where it is missing or null. Raises BadRow."""
    value = row.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRow(f"bad {key}", f"`{key}` is a {type(value).__name__} where a list belongs")
    return [as_text(part, key) for part in value]


def question(
    source: str,
    row_id: str,
    problem: str,
    *accepted: str,
    capability: str,
    images: Sequence[str] = (),
    options: Sequence[str] = (),
    kind: str = "",
    metadata: dict[str, Any],
) -> Problem:
    """A row's Problem: options written into the text, marks for the images, the answer's type; empty metadata left out.

    Args:
      row_id: the published id, or what stands for one; the problem's begins with the source.
      accepted: the answer, or all that count; with options, the letter or text of one.

    Raises:
      BadRow: the answer is none of the options or too long to be compared; marks and images differ.
    """
    if options:
        problem, bare = wording.with_options(problem, options)
        accepted = tuple(wording.choice(answer, bare) for answer in accepted)
    answers, repaired = golds.accepted([("answer", one) for one in accepted], problem, "letter" if options else "")
    if not answers:
        raise BadRow("no answer", "the answer is empty")
    return Problem(
        id=f"{source}-{row_id}",
        problem=wording.marked(problem, len(images)),
        answer=answers[0],
        answers=answers if len(answers) > 1 else (),
        images=tuple(images),
        capability=capability,
        kind=kind,
        answer_type="letter" if options else "",
        source=source,
        metadata={key: value for key, value in metadata.items() if value not in ("", None, [])},
        repaired=tuple(repaired),
    )


def caption(source: str, image_id: str, image: str, words: str, metadata: dict[str, Any], row_id: str = "") -> Problem:
    """A row of a caption set: what caption SFT trains on, and what perception questions are written from.

    Args:
      row_id: where the image's id isn't to be the row's.
    """
    return Problem(
        id=f"{source}-{row_id or image_id}",
        problem="Describe the image in detail.",
        answer="",
        images=(image,),
        capability="perception",
        kind="caption",
        response=words.strip(),
        source=source,
        metadata={"image_id": image_id} | metadata,
    )


# ---------------------------------------------------------------------- images


def image_file(directory: Path, record: Record, *names: str) -> str:
    """The absolute path of the first of `names` that is a file, looked up from the row's file up to the folder.

    Raises:
      BadRow: there is none, or a name leads out of the folder.
    """
    folders = [record.file.parent]
    while folders[-1] != directory and directory in folders[-1].parents:
        folders.append(folders[-1].parent)
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name or "://" in name:
            raise BadRow("bad image", f"{short(name, 80)} is no path inside the folder")
        for folder in folders:
            try:
                if (folder / path).is_file():
                    return os.path.abspath(folder / path)
            except (OSError, ValueError):  # a name that no file can have
                break
    raise BadRow("missing image", f"{short(names[0], 80)} is not there; unpack the set's images")


def embedded_image(value: Any, images: Path) -> str:
    """Unpacks an image column of Parquet, {"bytes": ..., "path": ...}, and returns the file's path. Raises BadRow."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise BadRow("missing image", "the row holds no image bytes")
    return os.path.abspath(unpack_image(data, images))
