"""A tiny benchmark with images in three formats, for tests of asking."""

from __future__ import annotations

from pathlib import Path

from capcur_jax.evaluation.benchmarks.base import Benchmark, Row, Verdict
from tests.conftest import random_image

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
SECRET = "gold-of-nobody"  # in the gold and the facts of every row, and in no question


def rows(folder: Path, count: int = 6) -> list[Row]:
    """Each with one image more than the one before, 0 to 2."""
    files = []
    for number, kind in enumerate(FORMATS):
        files.append(folder / f"{number}.{kind.lower()}")
        random_image(40, 30, seed=number).save(files[-1], kind)
    return [
        Row(
            str(7 + at), f"Question {at}?", (f"{SECRET}-{at}",), tuple(files[(at + i) % 3] for i in range(at % 3)),
            {"A": "yes", "B": "no"}, {"category": f"c{at % 2}", "answer": SECRET}, cluster=f"g{at // 2}",
        )
        for at in range(count)
    ]  # fmt: skip


def rule(row: Row, text: str, extracted: str | None) -> Verdict:
    return Verdict(float(text == f"reply {int(row.index) - 7}"), "rule", text or None)


def tiny(made: list[Row]) -> Benchmark:
    """Right is "reply N" to question N."""

    def metrics(rows, verdicts, mode):
        return {"score": 100 * sum(verdict.credit for verdict in verdicts) / len(rows)}

    return Benchmark(
        "tiny", "Tiny", ("tiny.tsv",), "the tests", {6: "whole"}, lambda source, unpacked: made,
        lambda row: f"{row.question}\nA. yes\nB. no", rule, rule, metrics,
    )  # fmt: skip
