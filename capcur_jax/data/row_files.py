"""Kinds of files that hold rows: JSON lines and lists, also in gzip, Parquet, Arrow, Hugging Face's folders.

The end of its name says which one a file is, in any case. The rows come as they are; `fields` makes problems of them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from capcur_jax.data import parquet
from capcur_jax.data.problem import BadRow, short
from capcur_jax.data.sources import json_stream
from capcur_jax.errors import InputError

# Ends of names that are no rows to us, and what to do.
_OTHERS = {
    (".csv", ".tsv", ".xls", ".xlsx", ".feather", ".pkl", ".npz"): "write its rows as .jsonl or .parquet",
    (".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst"): "unpack it and give the file inside",
}
_POINTER = b"version https://git-lfs.github.com/spec/"
_HEAD = 1 << 12


class Raw(NamedTuple):
    """A row as its file has it."""

    where: str  # "file:line", "file, row 3"
    number: int
    value: Any  # a BadRow where it can't be read


def kind_of(path: Path) -> str:
    """The end of a file's name that says what it is: ".jsonl", ".json", ".parquet", ".arrow" or "folder".

    Raises:
      InputError: there is no such file, or it can't hold rows.
    """
    if not path.exists():
        raise InputError(f"{path}: no such problem file; check the path, or build the set first")
    if path.is_dir():
        if not (path / "state.json").is_file():
            raise InputError(f"{path}: not a file; {_inside(path)}")
        return "folder"
    if not path.is_file():
        raise InputError(f"{path}: not a file; give the .jsonl or .parquet file itself")
    ends = [end.lower() for end in path.suffixes]
    last = ends[-1] if ends else ""
    for others, remedy in _OTHERS.items():
        if last in others:
            raise InputError(f"{path}: rows are not read from {last}; {remedy}")
    if last == ".gz":
        if ends[-2:-1] and ends[-2] in (".parquet", ".arrow", ".tar"):
            raise InputError(f"{path}: {ends[-2]} is not read from inside gzip; unpack it first (gunzip)")
        last = ".json" if ends[-2:-1] == [".json"] else ".jsonl"
    return last if last in (".json", ".parquet", ".arrow") else ".jsonl"


def stem(path: Path) -> str:
    """The file's name without the ends that say its kind: `a.jsonl.gz` is `a`."""
    name = path.stem if path.suffix.lower() == ".gz" else path.name
    return Path(name).stem


def rows(path: Path, held: int) -> Iterator[Raw]:
    """The rows of a file, in its order.

    Args:
      held: rows of a Parquet or Arrow file that are in memory at a time; each may bring its images.

    Raises:
      InputError: the file as a whole can't be read.
    """
    kind = kind_of(path)
    if kind != "folder" and _head(path).startswith(_POINTER):
        what = "a Git LFS pointer: the file itself is not here; get it with `git lfs pull`"
        yield Raw(f"{path}:1", 1, BadRow("Git LFS pointer", what))
        return
    if kind == ".jsonl" or (kind == ".json" and _holds_lines(path)):
        for number, line in _lines(path):
            yield Raw(f"{path}:{number}", number, line)
        return
    if kind == ".parquet":
        found = parquet.rows(path, held)
    elif kind == ".json":
        found = json_stream.items(path)
    else:
        found = parquet.arrow_rows(_parts(path) if kind == "folder" else [path], held)
    for number, row in found:
        yield Raw(f"{path}, row {number}", number, row)


def decoded(line: bytes) -> Any:
    """A line of JSON. Raises BadRow."""
    try:
        return json.loads(line.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError:
        raise BadRow("not UTF-8", "not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        detail = f"not JSON ({short(str(error), 80)}); write one JSON object a line"
        raise BadRow("not JSON", detail) from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def opened(path: Path) -> Any:
    """The file's bytes, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    # Bytes, split at \n only: text would also break at U+2028, and one bad byte would cost the whole file.
    try:
        with opened(path) as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    try:
                        yield number, decoded(line)
                    except BadRow as error:
                        yield number, error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: no whole gzip file ({short(str(error), 80)}); write or download it again") from None


def _head(path: Path) -> bytes:
    """The first bytes; of a gzip file that is none, its own."""
    try:
        with opened(path) as file:
            return file.read(_HEAD).removeprefix(b"\xef\xbb\xbf")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        with path.open("rb") as file:
            return file.read(_HEAD)


def _holds_lines(path: Path) -> bool:
    """Whether a .json file holds one object after another. Raises InputError where it is neither that nor a list."""
    if _head(path).lstrip()[:1] != b"{":
        return False
    _, first = next(_lines(path))
    if isinstance(first, BadRow) or (len(first) <= 2 and any(isinstance(value, list) for value in first.values())):
        raise InputError(f"{path}: one JSON object; give a list of rows, or JSON lines (.jsonl)")
    return True


def _parts(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `save_to_disk` wrote."""
    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
        return [folder / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, OSError):
        raise InputError(f"{folder}: its state.json names no data files; save the dataset again") from None


def _inside(folder: Path) -> str:
    """What to give in a folder's place."""
    splits = sorted(file.parent.name for file in folder.glob("*/state.json"))
    if splits:
        return f"it holds {', '.join(splits[:8])}; give one of them ({folder / splits[0]})"
    return "give the .jsonl or .parquet file itself"
