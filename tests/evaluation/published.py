"""Small files in the formats in which benchmarks are published."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def png(shade: int) -> bytes:
    """A picture that differs from those of other shades."""
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (shade % 256, shade // 256, 3)).save(file, "PNG")
    return file.getvalue()


def base64_of(shade: int) -> str:
    return base64.b64encode(png(shade)).decode()


def table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> Path:
    """VLMEvalKit's TSV, as pandas writes it: cells are quoted where they must be."""
    rows = list(rows)
    columns = list(columns or dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row.get(column, "") for column in columns] for row in rows)
    return path


def workbook(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(path)
    return path


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def choices(index: Any, **cells: Any) -> dict[str, Any]:
    """A row of a table with options."""
    row = {"index": index, "image": base64_of(int(index)), "question": "Which?", "A": "red", "B": "blue", "answer": "B"}
    return row | cells
