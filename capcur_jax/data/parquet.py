"""Rows of Parquet and Arrow files, whatever their columns hold: one that can't be read costs itself alone.

A value that can't be read is a BadRow in its place in the row: it costs the row only where its key is needed.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from capcur_jax.data.problem import BadRow, short
from capcur_jax.errors import InputError

_NO_VALUE = (ValueError, OverflowError, NotImplementedError)  # pyarrow's, of a value that Python can't have


def rows(path: Path, held: int) -> Iterator[tuple[int, dict | BadRow]]:
    """Numbers from 1 and rows; a BadRow in the place of each row, and of each value, that can't be read.

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
        _refuse_twins(path, file.schema_arrow.names)
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
                    _refuse_twins(path, batch.schema.names)
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


def _refuse_twins(path: Path, names: list[str]) -> None:
    """Raises InputError where two columns have one name: the last of them would hide the others."""
    if twins := sorted(name for name, count in collections.Counter(names).items() if count > 1):
        what = ", ".join(short(name) for name in twins[:8])
        raise InputError(f"{path}: more than one column is called {what}; rename the others or take them out")


def _unreadable(path: Path, error: Exception, kind: str = "Parquet") -> InputError:
    return InputError(f"{path}: no readable {kind} file ({short(str(error), 120)}); write or download it again")


def _rows(batch: Any) -> list[dict]:
    """The rows of a batch in Python's own types."""
    import pyarrow

    singles = [f.name for f in batch.schema if pyarrow.types.is_float32(f.type) or pyarrow.types.is_float16(f.type)]
    found = _python_rows(batch)
    for name in singles:
        shorter = np.float32 if pyarrow.types.is_float32(batch.schema.field(name).type) else np.float16
        for row in found:  # the decimal that was written rather than what single precision makes of it: 3.3
            if row[name] is not None:
                row[name] = float(str(shorter(row[name])))
    return found


def _python_rows(batch: Any) -> list[dict]:
    import pyarrow

    # Times become texts here: Python's own have no nanoseconds (pandas writes them) and end with the year 9999.
    for place, field in enumerate(batch.schema):
        if pyarrow.types.is_temporal(field.type) and (texts := _times_as_texts(batch.column(place))) is not None:
            batch = batch.set_column(place, field.name, texts)
    try:
        return batch.to_pylist()
    except _NO_VALUE:
        columns = [_values(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(name: str, column: Any) -> list[Any]:
    """A column's values, a BadRow in the place of each that can't be read."""
    try:
        return column.to_pylist()
    except _NO_VALUE:
        texts = _times_as_texts(column)
    return [_value(name, scalar) for scalar in (column if texts is None else texts)]


def _value(name: str, scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except _NO_VALUE as error:  # not UTF-8, most often
        what = f"`{short(name)[1:-1]}` can't be read ({short(str(error), 80)}); write it anew or take the row out"
        return BadRow("unreadable row", what)


def _times_as_texts(column: Any) -> Any:
    """The column with its times as texts, nested ones too; those of a zone that isn't known in UTC. None: it can't."""
    import pyarrow

    text, types = pyarrow.string(), pyarrow.types

    def in_utc(kind: Any) -> Any:
        return pyarrow.timestamp(kind.unit, tz="UTC") if types.is_timestamp(kind) and kind.tz else kind

    for zone in (lambda kind: kind, in_utc):
        try:
            return column.cast(_with_times(column.type, zone)).cast(_with_times(column.type, lambda _: text))
        except pyarrow.ArrowException:
            continue
    return None


def _with_times(kind: Any, change: Callable[[Any], Any]) -> Any:
    """An Arrow type whose types of times, nested ones too, are changed."""
    import pyarrow

    types = pyarrow.types
    if types.is_temporal(kind):
        return change(kind)
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_with_times(field.type, change)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_with_times(kind.key_type, change), _with_times(kind.item_type, change))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_with_times(kind.value_type, change)))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_with_times(kind.value_type, change)), kind.list_size)
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_with_times(kind.value_type, change)))
    return kind
