"""What stands in a file, row by row: a table (TSV, XLSX), JSON lines, a JSON list, an object of rows, Parquet.

What a file is follows from its content, not from its name. A table's cells are texts as they stand: an option "None" or
"NA" is an option, only an empty cell is none. A file of any size takes the memory of a few rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capcur_jax.data import parquet
from capcur_jax.data.problem import BadRow, short
from capcur_jax.data.row_files import decoded
from capcur_jax.data.sources import json_stream
from capcur_jax.errors import InputError

LONGEST_CELL = 1 << 30  # characters: several pictures in one cell
_HELD = 8  # rows of a Parquet file in memory at a time; each may bring its images


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line" or "file, row 3", what stands there): a dict; a Cells where it is a table; a BadRow.

    Raises:
      InputError: the file as a whole can't be read.
    """
    try:
        yield from {
            "parquet": _parquet, "xlsx": _workbook, "list": _json_list, "lines": _json_lines, "object": _json_object,
            "table": _table,
        }[kind_of(path)](path)  # fmt: skip
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; download it again, or save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); check the path") from None


class Cells(dict):
    """A table's row: the texts of its cells that are not empty, and `columns`, all that the table has."""

    columns: frozenset[str] = frozenset()


def kind_of(path: Path) -> str:
    """ "parquet", "xlsx", "list", "lines", "object" or "table", by the file's first bytes. Raises InputError."""
    with path.open("rb") as file:
        head = file.read(1 << 12)
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the file; get it with `git lfs pull`")
    if head.startswith(b"\x80"):
        raise InputError(f"{path}: a pickle, which can run anything when it is read; give the kit's .tsv or .xlsx")
    if head.startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: compressed with gzip; unpack it first")
    for mark, kind in ((b"PAR1", "parquet"), (b"PK\x03\x04", "xlsx")):
        if head.startswith(mark):
            return kind
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"{"):
        return "list" if head.startswith(b"[") else "table"
    with path.open("rb") as file:
        line = next(line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n"))
        try:
            first, more = decoded(line.removeprefix(b"\xef\xbb\xbf")), any(rest.strip() for rest in file)
        except BadRow:
            return "object"
    return "object" if not more and _members(first) else "lines"


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in parquet.rows(path, _HELD):
        yield f"{path}, row {number}", row


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in json_stream.items(path):
        yield f"{path}, row {number}", row if isinstance(row, dict | BadRow) else _no_object(row)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                try:
                    row = decoded(line)
                except BadRow as error:
                    row = error
                yield f"{path}:{number}", row if isinstance(row, dict | BadRow) else _no_object(row)


def _json_object(path: Path) -> Iterator[tuple[str, Any]]:
    """One object that holds rows: as large as a set of texts."""
    try:
        found = decoded(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except BadRow as error:
        raise InputError(f"{path}: {error.args[1]}") from None
    rows = _members(found)
    if rows is None:
        raise InputError(f"{path}: one object without rows in it; give the set's file")
    for label, row in rows:
        yield f"{path}, {label}", row


def _members(found: dict[str, Any]) -> list[tuple[str, Any]] | None:
    """(label, row) of the rows in one object: under their ids, or as a list under "data". None: it is a row itself."""
    if isinstance(listed := found.get("data"), list):
        rows = enumerate(listed, start=1)
        return [(f"row {number}", row if isinstance(row, dict) else _no_object(row)) for number, row in rows]
    if not found or not all(isinstance(row, dict) for row in found.values()):
        return None
    return [(short(key), {"id": key} | row) for key, row in found.items()]


def _no_object(row: Any) -> BadRow:
    return BadRow("not an object", f"a JSON {type(row).__name__} where an object belongs; download the file again")


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t", strict=True)
        try:
            yield from _cells(path, reader)
        except csv.Error as error:
            what = f"no table with tabs ({short(str(error), 80)})"
            raise InputError(f"{path}, line {reader.line_num}: {what}; download it again") from None


def _workbook(path: Path) -> Iterator[tuple[str, Any]]:
    import openpyxl  # here: most sets need none

    try:
        with path.open("rb") as file:  # opened here: openpyxl itself goes by the name's end
            # Formulas as text: a prediction "=3" is one to a spreadsheet, and has no value.
            book = openpyxl.load_workbook(file, read_only=True, data_only=False)
            cells = book.worksheets[0].iter_rows(values_only=True)
            yield from _cells(path, ([_text(cell) for cell in row] for row in cells))
    except InputError:
        raise
    except Exception as error:  # openpyxl raises a dozen kinds
        raise InputError(f"{path}: no readable XLSX file ({short(str(error), 80)}); write it as .tsv") from None


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(getattr(cell, "text", cell))  # an array formula has its text


def _cells(path: Path, lines: Iterator[list[str]]) -> Iterator[tuple[str, Any]]:
    head = next(lines, [])
    columns = frozenset(head)
    if len(columns) < 2 or len(columns) < len([name for name in head if name]):
        raise InputError(f"{path}: no table with a head of different names; give the kit's TSV, XLSX, JSON or Parquet")
    for number, line in enumerate(lines, start=1):
        if not any(line):
            continue
        if len(line) > len(head):
            yield f"{path}, row {number}", BadRow("cells", f"{len(line)} cells under {len(head)} names; write it anew")
            continue
        row = Cells((name, cell) for name, cell in zip(head, line, strict=False) if cell and name)
        row.columns = columns
        yield f"{path}, row {number}", row
