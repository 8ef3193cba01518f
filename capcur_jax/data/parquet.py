"""Rows of Parquet files, whatever their columns hold: one that can't be read costs itself alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capcur_jax.data.fields import BadRow
from capcur_jax.data.problem import short
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


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: no readable Parquet file ({short(str(error), 120)}); write or download it again")


def _rows(batch: Any) -> list[dict | BadRow]:
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
