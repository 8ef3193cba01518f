"""Rows of benchmarks from published files: VLMEvalKit's table, or JSON, JSON lines, Parquet and XLSX.

contents.py reads the files, a row at a time; here a row gets its images, and one picture is in memory at a time.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from capcur_jax.data.problem import BadRow, short
from capcur_jax.data.row_images import image_bytes
from capcur_jax.data.sources import published
from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks.base import Row
from capcur_jax.evaluation.contents import Cells, records

LONGEST_REFERENCE = 64  # characters of an `image` that is another row's index
LONGEST_LITERAL = 1 << 20
_NOTHING = ("", "nan", "NaN", "None", "none", "null", "NA", "N/A")  # of `image`, where no text can be meant

_WITHOUT_IMAGE = "without image"
_NO_GOLD = ("no answer", "no label", "no gt_answer", "no ground_truth")  # what a row is refused for without its gold


class Rows(list[Row]):
    """A benchmark's rows, and what became of the file's others.

    files: those that were read. digest: md5 of the first one, in hex. left_out: reason -> how many rows.
    """

    def __init__(self, rows: Sequence[Row], files: Sequence[Path] = (), digest: str = "", left_out: Any = ()):
        super().__init__(rows)
        self.files, self.digest, self.left_out = tuple(files), digest, dict(left_out)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published row as it stands in its file.

    number: from 0, over all files of the set. value: of a table the cells that are not empty, without `image`.
    pictures: of a table, the unpacked images. picture: what tells the row's picture from others, "" where unknown.
    unpacked: where images go; None: they are not wanted.
    """

    root: Path
    file: Path
    number: int
    value: dict[str, Any]
    is_table: bool = False
    pictures: tuple[Path, ...] = ()
    picture: str = ""
    unpacked: Path | None = None

    @property
    def index(self) -> str:
        """A table's index as text. Raises BadRow."""
        return index_text(self.text("index"))

    def text(self, key: str) -> str:
        """A text that must be there. Raises BadRow."""
        return published.text(self.value, key)

    def optional(self, key: str) -> str:
        """A text, "" where it is missing. Raises BadRow."""
        return published.optional_text(self.value, key)

    def list(self, key: str) -> list[Any]:
        """A list, or a text that is a Python or JSON literal of one; [] where it is missing. Raises BadRow."""
        return self._literal(key, list, [])

    def dict(self, key: str) -> dict[str, Any]:
        """As `list`, of a dict."""
        return self._literal(key, dict, {})

    def options(self) -> dict[str, str]:
        """The options in a table's columns A, B, C, ...: letter -> text."""
        return {key: self.value[key] for key in sorted(self.value) if len(key) == 1 and "A" <= key <= "Z"}

    def images(self, *keys: str) -> tuple[Path, ...]:
        """The row's images: a table's own, else paths or bytes under the keys. Raises BadRow: one is not there."""
        if self.is_table or self.unpacked is None:
            return self.pictures
        values = [part for key in keys for part in _parts(self.value.get(key))]
        found = tuple(self._located(value) for value in values)
        if not found:
            raise BadRow("missing image", f"no image under {' or '.join(keys)}; download the file again")
        return found

    def named(self, *names: str) -> tuple[Path, ...]:
        """The first of several names that is a file: of a set whose rows name no image. Raises BadRow."""
        return () if self.unpacked is None else (self._located(*names),)

    def shown(self, *keys: str) -> str:
        """What tells the row's picture from others: a path as published, a digest of bytes, or "" where unknown."""
        for value in (part for key in keys for part in _parts(self.value.get(key))):
            if isinstance(value, str):
                return value
            data = value.get("bytes") if isinstance(value, dict) else value
            if isinstance(data, bytes):
                return _digest(data)
        return self.picture

    def _located(self, *values: Any) -> Path:
        if not isinstance(values[0], str):
            assert self.unpacked is not None
            return Path(published.embedded_image(values[0], self.unpacked))
        folders = ("", f"images/{self.file.stem.removesuffix('_local')}/", "images/")
        names = [f"{folder}{value}" for value in values for folder in folders]
        return Path(published.image_file(self.root, published.Record(self.file, self.number, None), *names))

    def _literal(self, key: str, kind: type, missing: Any) -> Any:
        value = self.value.get(key)
        if isinstance(value, str):
            value = literal(value, key) if value.strip() else None
        if value is None:
            return missing
        if not isinstance(value, kind):
            raise BadRow(f"bad {key}", f"`{key}` is no {kind.__name__}; download the file again")
        return value


def index_text(value: Any) -> str:
    """The text form of an index: of 7, 7.0, "7" and "7.0" it is "7". Raises BadRow."""
    text = published.as_text(value, "index").strip()
    whole, point, rest = text.partition(".")
    return whole if point and rest.strip("0") == "" and whole.lstrip("-").isdigit() else text


def literal(text: str, key: str) -> Any:
    """The value of a Python literal (None, single quotes), or of JSON; nothing is evaluated. Raises BadRow."""
    if len(text) <= LONGEST_LITERAL:
        for reader in (ast.literal_eval, json.loads):
            try:
                return reader(text.strip())
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
    raise BadRow(f"bad {key}", f"`{key}` is no list or dict ({short(text)}); download the file again")


def load(
    source: Path, names: Sequence[str], unpacked: Path | None, convert: Callable[[Entry], Row | str], where: str = ""
) -> Rows:
    """The rows of a benchmark's file.

    Args:
      source: the file, or a folder with files of the names.
      names: under which the set is published, patterns too; the first that is there is taken.
      unpacked: folder for images that lie in the file; None: the images are not wanted.
      convert: makes a row; or says in a few words why this one is none of the benchmark's. Raises BadRow.
      where: who publishes it, for the message.

    Raises:
      InputError: no such file, it can't be read, or one of its rows is not as published.
    """
    root, files = find(source, names, where)
    found = _read(root, files, convert, _Pictures(unpacked))
    if not found and unpacked is None and set(found.left_out) == {_WITHOUT_IMAGE}:  # somebody took the images out
        found = _read(root, files, convert, _Pictures(None, needed=False))
    if not found:
        raise InputError(f"{source}: no row of the benchmark in it ({counted(found.left_out)}); give another --data")
    return found


def _read(root: Path, files: Sequence[Path], convert: Callable[[Entry], Row | str], pictures: _Pictures) -> Rows:
    rows: list[Row] = []
    places: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    number = 0
    for file in files:
        for label, value in records(file):
            try:
                if isinstance(value, BadRow):
                    raise value
                entry = _entry(root, file, number, value, pictures)
                number += 1
                row = entry if isinstance(entry, str) else convert(entry)
                if isinstance(row, str):
                    left_out[row] += 1
                    continue
                if row.index in places:
                    raise BadRow("index twice", f"index {short(row.index)} is there twice; download the file again")
                if not row.gold or not all(row.gold):
                    raise BadRow("no answer", "it has no right answer")
            except BadRow as error:
                remedy = "; give the file with the right answers (--data)" if error.args[0] in _NO_GOLD else ""
                raise InputError(f"{label}: {error.args[1]}{remedy}") from None
            places[row.index] = len(rows)
            rows.append(dataclasses.replace(row, cells=value) if isinstance(value, Cells) else row)
    pictures.follow(rows, places, files[0])
    return Rows(rows, files, md5(files[0]), left_out)


def counted(counts: Any) -> str:
    """ "3 without image, 788 of another version"; "it is empty" of none."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "it is empty"


def find(source: Path, names: Sequence[str], where: str = "") -> tuple[Path, list[Path]]:
    """(the folder that images are looked for in, the files), those of a folder up to two levels deep."""
    if source.is_file():
        beside = source.parent
        above = not (beside / "images").is_dir() and (beside.parent / "images").is_dir()
        return beside.parent if above else beside, [source]
    if not source.is_dir():
        raise InputError(f"{source}: no such file or folder; give --data, the file or folder of {where or names[0]}")
    for name in names:
        for folder in ("", "*/", "*/*/"):
            if found := [path for path in sorted(source.glob(folder + name)) if path.is_file()]:
                return source, found
    raise InputError(f"{source}: holds none of {', '.join(names)}" + (f"; get it from {where}" if where else ""))


def md5(path: Path) -> str:
    """In hex; the kit names versions of its tables by the first 8 digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# ---------------------------------------------------------------------- images


def _entry(root: Path, file: Path, number: int, value: Any, pictures: _Pictures) -> Entry | str:
    if not isinstance(value, Cells):
        return Entry(root, file, number, value, unpacked=pictures.unpacked)
    image = value.pop("image", "")
    entry = Entry(root, file, number, value, True, unpacked=pictures.unpacked)
    if image not in _NOTHING:
        paths, picture = pictures.of(image, index_text(value.get("index", "")))
        return dataclasses.replace(entry, pictures=paths, picture=picture)
    path = value.get("image_path", "")
    if "image" in value.columns and not path and pictures.needed:
        return _WITHOUT_IMAGE
    names = _parts(literal(path, "image_path") if path.startswith("[") else path or None)
    if pictures.unpacked is None:
        return dataclasses.replace(entry, picture=path)
    if not names:
        raise BadRow("missing image", "the table has no images; give the kit's own TSV, not one of predictions")
    return dataclasses.replace(entry, pictures=tuple(entry._located(name) for name in names), picture=path)


class _Pictures:
    """The images in a table's cells. needed: a row that has none is left out, as the kit does."""

    def __init__(self, unpacked: Path | None, needed: bool = True):
        self.unpacked, self.needed = unpacked, needed
        self._known: dict[str, tuple[tuple[Path, ...], str]] = {}
        self._others: dict[str, str] = {}  # index -> that of the row whose picture it shows

    def of(self, cell: str, index: str) -> tuple[tuple[Path, ...], str]:
        """(paths, what tells the picture from others); no paths yet where the cell names another row. Raises BadRow."""
        if len(cell) <= LONGEST_REFERENCE:
            self._others[index] = index_text(cell)
            return (), f"row {index_text(cell)}"
        texts = [cell]
        if cell.startswith("["):
            try:
                texts = ast.literal_eval(cell)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                texts = []
            if not texts or not all(isinstance(text, str) for text in texts):
                raise BadRow("bad image", "`image` is no list of base64 texts; download the file again")
        found = (), _digest("".join(texts).encode())
        if self.unpacked is not None:
            found = tuple(self._path(text) for text in texts), found[1]
        self._known[index] = found
        return found

    def follow(self, rows: list[Row], places: dict[str, int], file: Path) -> None:
        """Puts in the images of rows that name another one. Raises InputError: it has none of its own."""
        for index, other in self._others.items():
            if index not in places:
                continue
            if other not in self._known:
                if self.unpacked is None:
                    continue  # nobody looks at it
                what = f"`image` of row {short(index)} names row {short(other)}, which has no image of its own"
                raise InputError(f"{file}: {what}; download the file again")
            row, (paths, picture) = rows[places[index]], self._known[other]
            cluster = picture if row.cluster == f"row {other}" else row.cluster
            rows[places[index]] = dataclasses.replace(row, images=paths, cluster=cluster)

    def _path(self, text: str) -> Path:
        assert self.unpacked is not None
        data = image_bytes(text)
        if data is None:
            raise BadRow("bad image", f"`image` is no base64 of a known kind of image ({short(text)}); get it again")
        return Path(os.path.abspath(published.embedded_image(data, self.unpacked)))


def _parts(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
