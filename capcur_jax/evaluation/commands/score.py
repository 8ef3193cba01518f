"""`score`: recorded predictions of a benchmark, scored without any model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capcur_jax.errors import InputError
from capcur_jax.evaluation import contents, recorded, rules, tables
from capcur_jax.evaluation.benchmarks import registry
from capcur_jax.evaluation.benchmarks.base import MODES, Benchmark, Row
from capcur_jax.evaluation.scoring import Scored, score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--benchmark", required=True, metavar="NAME", help="which one; --list prints their names")
    add("--predictions", required=True, metavar="FILE",
        help='VLMEvalKit\'s TSV, XLSX or JSON, or JSON lines of {"index", "prediction", "extracted"?}')  # fmt: skip
    add("--data", metavar="PATH",
        help="the benchmark's file or folder (default: the predictions, if they are a table with answers)")  # fmt: skip
    add("--read", choices=rules.READINGS, default="raw",
        help="what of a reply is read: all of it (default), or its last box behind the thought")  # fmt: skip
    add("--judge", choices=("none",), default="none",
        help="what decides where rules don't: none (default), such rows are counted as undecided")  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints what was read to stderr, and returns the scores in both modes."""
    benchmark, file = registry.get(arguments.benchmark), Path(arguments.predictions)
    predictions = recorded.read(file)
    data = _data(benchmark, Path(arguments.data) if arguments.data else _with_answers(file), predictions)
    tell(described(benchmark, data))
    rows, replies, said = recorded.join(data, predictions, file)
    for line in said:
        tell(line)
    result: dict[str, Any] = {"benchmark": benchmark.name, "rows": len(rows)}
    for mode in MODES:
        scored = score(benchmark, rows, replies, mode, arguments.read)
        tell(told(mode, scored))
        result[mode] = scored.numbers
    return result


def _data(benchmark: Benchmark, source: Path, predictions: Sequence[recorded.Prediction]) -> list[Row]:
    """The rows; of a folder with a small set and the whole one those of the whole, if it alone has all predictions."""
    found = benchmark.load(source, None)
    indices = {prediction.index for prediction in predictions}
    if benchmark.whole is None or source.is_file() or indices <= {row.index for row in found}:
        return found
    try:
        whole = benchmark.whole(source, None)
    except InputError:  # there is only one
        return found
    return whole if indices <= {row.index for row in whole} else found


def _with_answers(file: Path) -> Path:
    _, first = next(contents.records(file))
    if "answer" not in getattr(first, "columns", ()):
        raise InputError(f"{file}: it has no right answers; give the benchmark's file or folder (--data)")
    return file


def described(benchmark: Benchmark, rows: Sequence[Row]) -> str:
    """Which set the rows are, from their number and the file's digest."""
    known = benchmark.sets.get(len(rows), "no whole set: a part, or a version that is not known")
    line = f"{benchmark.title}: {len(rows):,} rows, {known}"
    if isinstance(rows, tables.Rows):
        version = benchmark.digests.get(rows.digest[:8])
        line += f"; {rows.files[0]}, md5 {rows.digest}" + (f" ({version})" if version else "")
        line += f"; left out: {tables.counted(rows.left_out)}" if rows.left_out else ""
    return line


def told(mode: str, scored: Scored) -> str:
    """A score in a line, and how it came about."""
    numbers, shares = scored.numbers, scored.shares
    value = "no score" if numbers["score"] is None else f"{numbers['score']:.2f}"
    ways = ", ".join(f"{share:.1%} {name}" for name, share in shares.items() if share or name == "rule")
    return f"{mode}: {value} ({numbers['right']:,} of {numbers['rows']:,} rows right); decided by {ways}"


def tell(line: str) -> None:
    """To stderr: the last line of stdout is the result."""
    print(line, file=sys.stderr, flush=True)
