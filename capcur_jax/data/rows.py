"""Files of problems, in and out; docs/data.md says what a row holds and which kinds of files are read."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from capcur_jax.data import row_files
from capcur_jax.data.fields import KEYS, RowReader
from capcur_jax.data.problem import BadRow, Drop, Problem, short
from capcur_jax.errors import InputError
from capcur_jax.files import replacing

FORMATS = (".jsonl", ".parquet")  # that are written
_ALWAYS = ("id", "problem", "answer", "images")  # keys that every line has
_BATCH = 64  # rows of a Parquet file that are held at a time; each may bring its images


class Tally:
    """Counts rows and, by reason, those that were dropped."""

    def __init__(self, shown: int = 5):
        self.rows, self.dropped = 0, collections.Counter()
        self.examples: list[Drop] = []  # the first ones
        self.firsts: dict[str, Drop] = {}  # by reason
        self.repaired = collections.Counter()  # rows that were read otherwise than they are written, by what was done
        self.shown = shown

    def kept(self, rows: Iterable[Problem | Drop]) -> Iterator[Problem]:
        """Passes the problems on."""
        for row in rows:
            self.rows += 1
            yield from self.passed([row])

    def passed(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Of rows that were counted before, passes on what is no Drop, and counts the drops."""
        for row in rows:
            if isinstance(row, Drop):
                self.drop(row)
            else:
                if isinstance(row, Problem):
                    self.repair(row)
                yield row

    def repair(self, problem: Problem) -> None:
        """Counts what the reader changed of a row."""
        self.repaired.update(problem.repaired)

    def drop(self, drop: Drop) -> None:
        """One of the rows that were passed on is left out after all."""
        self.dropped[drop.reason] += 1
        self.firsts.setdefault(drop.reason, drop)
        if len(self.examples) < self.shown:
            self.examples.append(drop)

    def told(self) -> list[tuple[str, str]]:
        """(where, reason and detail) of the first drop of each reason that has more to say, for people."""
        return [(drop.where, f"{drop.reason}: {drop.detail}") for drop in self.firsts.values() if drop.detail]

    def summary(self) -> dict[str, Any]:
        kept = self.rows - self.dropped.total()
        repaired = {"repaired": dict(self.repaired.most_common())} if self.repaired else {}
        return {"rows": self.rows, "kept": kept, "dropped": dict(self.dropped.most_common()), **repaired}


# ---------------------------------------------------------------------- in


def read_rows(
    path: str | os.PathLike, capability: str = "", images: str | os.PathLike | None = None
) -> Iterator[Problem | Drop]:
    """The rows of a file in its order, each as a Problem or as what is wrong with it.

    Args:
      path: as `row_files` tells by its name, else UTF-8 JSON lines; a byte order mark, CRLF and blank lines are fine.
      capability: given to rows that name none.
      images: folder for images whose bytes lie in the rows, by default $CAPCUR_IMAGES or FILE-images beside the file.
        They are named by their content, so that reading again writes nothing.

    Raises:
      InputError: the file is missing, or can't be read as a whole; images can't be unpacked.
    """
    path = Path(path)
    reader, stem = RowReader(path, capability, images), row_files.stem(path)
    seen: dict[str, str] = {}
    for where, number, row in row_files.rows(path, _BATCH):
        try:
            if isinstance(row, BadRow):
                raise row
            problem = reader.problem(row, f"{stem}-{number}")
            if problem.id in seen:
                detail = f"id {short(problem.id)} is that of {seen[problem.id]} already; give each row its own"
                raise BadRow("duplicate id", detail)
        except BadRow as error:
            yield Drop(where, *error.args)
        else:
            seen[problem.id] = f"row {number}" if where.endswith(f"row {number}") else f"line {number}"
            yield problem


def read_problems(
    path: str | os.PathLike, capability: str = "", images: str | os.PathLike | None = None
) -> tuple[list[Problem], list[Drop]]:
    """The good rows of a file, and the others. Raises InputError as `read_rows`, and where no row is good."""
    problems: list[Problem] = []
    drops: list[Drop] = []
    for row in read_rows(path, capability, images):
        (drops if isinstance(row, Drop) else problems).append(row)
    if not problems:
        first = f" The first trouble: {drops[0]}" if drops else ""
        raise InputError(f"{path}: no usable row among {len(drops)}; docs/data.md says what a row needs.{first}")
    return problems, drops


# ---------------------------------------------------------------------- out


def write_rows(path: str | os.PathLike, problems: Iterable[Problem]) -> int:
    """Writes a file that `read_rows` reads back equal; it appears whole or not at all. Returns the number of rows.

    JSON lines name images by path: those below the file's folder from there, so that the folder can be moved. Parquet
    holds their bytes (a missing image keeps its path).

    Raises:
      InputError: the name ends neither in .jsonl nor in .parquet.
      ValueError: two rows share an id.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: the name must end in {' or '.join(FORMATS)}")
    write = _write_parquet if path.suffix == ".parquet" else _write_lines
    with replacing(path) as temporary:
        return write(temporary, _unique(path, problems), os.path.abspath(path.parent))


def _unique(path: Path, problems: Iterable[Problem]) -> Iterator[Problem]:
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"{path}: two rows have the id {short(problem.id)}; give each row its own")
        seen.add(problem.id)
        yield problem


def _write_lines(path: Path, problems: Iterable[Problem], folder: str) -> int:
    count = 0
    with path.open("wb") as file:
        for problem in problems:
            row = _row(problem) | {"images": [_stored_path(image, folder) for image in problem.images]}
            row = {key: value for key, value in row.items() if value not in (None, {}, [], "") or key in _ALWAYS}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def _write_parquet(path: Path, problems: Iterable[Problem], folder: str) -> int:
    import pyarrow
    import pyarrow.parquet

    image, texts = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]), pyarrow.string()
    kinds = {"images": pyarrow.list_(image), "predictions": pyarrow.list_(texts)}
    kinds["answers"] = pyarrow.list_(texts)
    kinds |= {"pass_rate": pyarrow.float64(), "correctness": pyarrow.list_(pyarrow.float64())}
    schema = pyarrow.schema([(key, kinds.get(key, texts)) for key in KEYS])
    count, rows = 0, []
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            rows.clear()

        for problem in problems:
            row = _row(problem) | {"images": [_packed(image, folder) for image in problem.images]}
            rows.append(row | {key: json.dumps(row[key], ensure_ascii=False) for key in ("pass_rate_by", "metadata")})
            count += 1
            if len(rows) == _BATCH:
                flush()
        flush()
    return count


def _row(problem: Problem) -> dict[str, Any]:
    row = {key: getattr(problem, key) for key in KEYS}
    return {key: list(value) if isinstance(value, tuple) else _copied(value) for key, value in row.items()}


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _packed(image: str, folder: str) -> dict[str, Any]:
    path = Path(image)
    if path.is_file():
        return {"bytes": path.read_bytes(), "path": path.name}
    return {"bytes": None, "path": _stored_path(image, folder)}


def _stored_path(image: str, folder: str) -> str:
    image = os.path.abspath(image)
    return os.path.relpath(image, folder) if image.startswith(os.path.join(folder, "")) else image
