"""The tables of docs/data.md, whose lines are tests."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def table(header: str, page: str = "data.md") -> list[list[str]]:
    """The lines of the table whose first line begins with `header`, as cells; code marks are taken off."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    rules = (number for number, line in enumerate(lines) if line.startswith("|---"))
    start = next(number for number in rules if lines[number - 1].startswith(f"| {header} |")) + 1
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    found = [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines[start:end]]
    assert len(found) > 3
    return found


def written(path: Path, *rows: dict | str | bytes) -> Path:
    """A file of JSON lines; texts and bytes are lines as they are."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path
