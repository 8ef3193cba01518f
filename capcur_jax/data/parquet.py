"""Rows of Parquet and Arrow files, whatever their columns hold: one that can't be read costs itself alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from capcur_jax.data.problem import BadRow, short
from capcur_jax.errors import InputError


def rows(path: Path, held: int) -> Iterator[tuple[int, dict | BadRow]]:
    """Numbers from 1 and rows; a BadRow in the place of each that can't be read.

    Args:
      held: rows that are in memory at a time; each may bring its images.

    Raises:
      InputError: the file as a whole, or its beginning, can't be read.
    """
    import pyarrow  # here: files of JSON lines are read without it
    import pyarrow.parquet

    broken = pyarrow.ArrowException, OSError, ValueError
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except broken as error:
        raise _unreadable(path, error) from None
    with file:
        number = end = 0
        for group in range(file.num_row_groups):
            end += file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(held, row_groups=[group]):
                    for row in _rows(batch):
                        number += 1
                        yield number, row
            except broken as error:
                if not number:
                    raise _unreadable(path, error) from None
                what = f"this part of the file can't be read ({short(str(error), 80)}); write or download it again"
                while number < end:
                    number += 1
                    yield number, BadRow("unreadable row", what)


def arrow_rows(paths: Iterable[Path], held: int) -> Iterator[tuple[int, dict | BadRow]]:
    """The rows of Arrow files (streams, as Hugging Face writes them, or files), one after the other; see `rows`."""
    import pyarrow
    import pyarrow.ipc

    number = 0
    for path in paths:
        try:
            with pyarrow.memory_map(str(path)) as file:
                for batch in _batches(file):
                    for start in range(0, batch.num_rows, held):
                        for row in _rows(batch.slice(start, held)):
                            number += 1
                            yield number, row
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _unreadable(path, error, "Arrow") from None


def _batches(file: Any) -> Iterator[Any]:
    import pyarrow
    import pyarrow.ipc

    if file.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        file.seek(0)
        yield from pyarrow.ipc.open_stream(file)


def _unreadable(path: Path, error: Exception, kind: str = "Parquet") -> InputError:
    return InputError(f"{path}: no readable {kind} file ({short(str(error), 120)}); write or download it again")


def _rows(batch: Any) -> list[dict | BadRow]:
    """The rows of a batch in Python's own types."""
    import pyarrow

    singles = [f.name for f in batch.schema if pyarrow.types.is_float32(f.type) or pyarrow.types.is_float16(f.type)]
    found = _python_rows(batch)
    for name in singles:
        shorter = np.float32 if pyarrow.types.is_float32(batch.schema.field(name).type) else np.float16
        for row in found:  # the decimal that was written rather than what single precision makes of it: 3.3
            if isinstance(row, dict) and row[name] is not None:
                row[name] = float(str(shorter(row[name])))
    return found


def _python_rows(batch: Any) -> list[dict | BadRow]:
    import pyarrow

    # Times become texts here: Python's own have no nanoseconds (pandas writes them) and end with the year 9999.
    for place, field in enumerate(batch.schema):
        if pyarrow.types.is_temporal(field.type):
            texts = batch.column(place).cast(pyarrow.string())
            batch = batch.set_column(place, field.name, texts)
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [_row(batch, place) for place in range(len(batch))]


def _row(batch: Any, place: int) -> dict | BadRow:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[place].as_py()
        except (ValueError, OverflowError) as error:  # not UTF-8, most often
            what = f"`{short(name)[1:-1]}` can't be read ({short(str(error), 80)}); write it anew or take the row out"
            return BadRow("unreadable row", what)
    return row
