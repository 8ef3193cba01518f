"""`compare`: whether evaluations differ by more than chance, on the questions that they share."""

from __future__ import annotations

import argparse
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from capcur_jax.evaluation.benchmarks.base import MODES
from capcur_jax.records.text import number, visible

WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="evaluations (their --workdir), or training runs: their final one")
    add("--mode", choices=MODES, default=MODES[0], help="whose rules say what is right (default: %(default)s)")
    add("--output", default="compare.json", metavar="FILE", help="gets all figures (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a table for each evaluation beside the first, and writes all figures. Raises InputError."""
    from capcur_jax.errors import InputError
    from capcur_jax.evaluation import comparison, folders
    from capcur_jax.records import jsonl

    if not 2 <= len(arguments.folders) <= len(string.ascii_uppercase):
        raise InputError("compare needs two evaluations or more: compare DIR DIR")
    first, *rest = [folders.read(place) for place in arguments.folders]
    letters = dict(zip(string.ascii_uppercase[1:], rest, strict=False))
    found = {letter: (folder, comparison.compare(first, folder, arguments.mode)) for letter, folder in letters.items()}
    console = Console(stderr=True, width=WIDTH, highlight=False)
    for letter, (folder, pairs) in found.items():
        for line in shown(str(first.path), letter, str(folder.path), pairs, arguments.mode):
            console.print(line)
    output = Path(arguments.output)
    try:
        jsonl.write_json_atomic(output, comparison.as_json(first, found, arguments.mode))
    except OSError as error:
        raise InputError(f"--output {output}: can't be written ({error.strerror}); name another place") from None
    return {
        "compared": {letter: str(folder.path) for letter, folder in letters.items()},
        "differ": {
            letter: [pair.benchmark for pair in pairs if pair.p_holm < 0.05] for letter, (_, pairs) in found.items()
        },
        "output": str(output),
    }


def shown(a: str, letter: str, b: str, pairs: Sequence[Any], mode: str) -> Iterator[RenderableType]:
    """The tables of two evaluations; no line is wider than WIDTH."""
    from capcur_jax.evaluation import comparison
    from capcur_jax.records.tables import titled

    yield Text.assemble(f"A: {visible(a)}\n", f"{letter}: {visible(b)}", overflow="fold")
    yield titled(
        f"Rows that are right, % ({mode})",
        ["benchmark", "A", letter, f"{letter} - A", "95 %", "p", "p Holm"],
        [_right(pair) for pair in pairs],
    )
    yield titled(
        "Rows, and the smallest difference that they could show (80 % power)",
        ["benchmark", "rows", "better", "worse", "clusters", "could show"],
        [
            (pair.benchmark, pair.right.rows, pair.right.wins, pair.right.losses, pair.right.clusters,
             number(100 * pair.right.detectable, ".1f") or "-")
            for pair in pairs
        ],
    )  # fmt: skip
    yield titled(
        "Tokens of a response, of a right one, and % cut at the limit",
        ["benchmark", "A", letter, "right A", f"right {letter}", "cut A", f"cut {letter}"],
        [(pair.benchmark, *_lengths(pair)) for pair in pairs],
    )
    lines = [f"{pair.benchmark}: {note}" for pair in pairs for note in comparison.notes(pair)]
    for line in dict.fromkeys(lines):
        yield Text(visible(line), style="yellow", overflow="fold")


def _right(pair: Any) -> list[str]:
    right, (a, b) = pair.right, pair.lengths
    return [
        pair.benchmark,
        number(100 * a["right"], ".1f"),
        number(100 * b["right"], ".1f"),
        number(100 * right.difference, "+.1f"),
        f"{100 * right.low:+.1f} {100 * right.high:+.1f}",
        _p(right.p),
        _p(pair.p_holm),
    ]


def _lengths(pair: Any) -> list[str]:
    a, b = pair.lengths
    return [
        *(number(one[key], ".0f") or "-" for key in ("tokens", "tokens_right") for one in (a, b)),
        *(number(one["cut"] and 100 * one["cut"], ".1f") or "-" for one in (a, b)),
    ]


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
