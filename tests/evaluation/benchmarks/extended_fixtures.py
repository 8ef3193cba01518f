"""Small files of the extended benchmarks in the formats in which they are published; contents of our own."""

from __future__ import annotations

import base64
import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from capcur_jax.evaluation.benchmarks.base import Benchmark, Row, Verdict

HOSTILE = {
    "deep JSON": "[" * 60_000,
    "deep object": '{"short answer": ' + "[" * 20_000 + "]" * 20_000 + "}",
    "many braces": "{}" * 150_000,
    "many brackets": "(A)" * 150_000,
    "huge number": "9" * 300_000,
    "huge exponent": "1e" + "9" * 300_000,
    "powers": "9**9**9**9",
    "huge short answer": '{"short answer": "' + "3." + "3" * 300_000 + '"}',
    "huge JSON number": '{"short answer": ' + "7" * 300_000 + "}",
    "many lines": "no\n\nyes\n\n" * 100_000,
    "many stops": "." * 200_000,
    "many boxes": r"\boxed{" * 60_000,
    "many thoughts": "<think>" * 60_000,
    "null bytes": "\0" * 300_000,
    "half a pair": "\ud83d" * 100_000,
}  # texts that a model may write by chance or malice


def picture(seed: int = 0) -> bytes:
    """A PNG that differs by its seed."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (seed % 256, seed // 256, 90)).save(file, "PNG")
    return file.getvalue()


def cell(seed: int = 0) -> str:
    """A picture as a table has it."""
    return base64.b64encode(picture(seed)).decode()


def table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """VLMEvalKit's TSV; a key that a row lacks is an empty cell."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", quoting=csv.QUOTE_ALL, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def written(path: Path, rows: Any) -> Path:
    """A .json, .jsonl or .parquet file; `path`'s folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed))
    return path


def credit(benchmark: Benchmark, row: Row, text: str, mode: str, extracted: str | None = None) -> float | str:
    """What a reply earns, or the kind of question that a judge is asked."""
    rule: Callable = benchmark.official if mode == "official" else benchmark.kit
    found = rule(row, text, extracted)
    return found.credit if isinstance(found, Verdict) else found.kind


def withstand(benchmark: Benchmark, row: Row, seconds: float = 2.0) -> None:
    """Every hostile text gets a verdict or a question to the judge within seconds of this process's own time."""
    for name, text in HOSTILE.items():
        for mode in ("official", "kit"):
            start = time.process_time()
            found = credit(benchmark, row, text, mode)
            took = time.process_time() - start
            assert took < seconds, (benchmark.name, mode, name, took)
            assert found in (0.0, "letter", "extract", "yes_no", "equal"), (benchmark.name, mode, name, found)


def verdicts(*credits: float) -> list[Verdict]:
    return [Verdict(one, "rule") for one in credits]
