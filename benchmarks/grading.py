"""Pairs of answers, graded: how many come out wrong, of which groups, and the time a pair takes.

    python benchmarks/grading.py [FILE.jsonl ...]

A line of a file is {"gold", "predicted", "equal", "group", "note"?} or [gold, predicted, equal]; pairs with a note are
debatable and counted apart. Without a file it takes the tests' pairs. Where math-verify is installed (pip install
'math-verify[antlr4_13_2]'), it grades the same pairs for comparison, in this process and without a time-out.
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import record
from absl import app

from capcur_jax.rewards.grade import Grader

TESTS = Path(__file__).parents[1] / "tests" / "rewards" / "pairs.jsonl"


def pairs(files: list[str]) -> Iterator[dict]:
    """The pairs of all files, in one form."""
    for file in files or [str(TESTS)]:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row if isinstance(row, dict) else dict(zip(("gold", "predicted", "equal"), row, strict=True))


def by_math_verify(predicted: str, gold: str) -> bool:
    """Its own verdict, as its README calls it."""
    peer = importlib.import_module("math_verify")  # installed by whoever wants the comparison
    read = [peer.parse(f"${text}$", parsing_timeout=None) for text in (gold, predicted)]
    return bool(peer.verify(*read, timeout_seconds=None))


def main(arguments: list[str]) -> None:
    rows, figures = list(pairs(arguments[1:])), {}
    graders = {}
    with Grader(workers=1, timeout_s=20.0) as grader:
        grader.grade([("x+1", "1+x"), ("5 cm", "5 m")])  # a worker and the tables of units are ready
        graders["capcur_jax"] = lambda predicted, gold: grader.grade([(predicted, gold)])[0]
        if importlib.util.find_spec("math_verify"):
            graders["math-verify"] = by_math_verify
        for name, grade in graders.items():
            seconds, wrong = [], collections.Counter()
            for row in rows:
                start = time.perf_counter()
                right = grade(row["predicted"], row["gold"])
                seconds.append(time.perf_counter() - start)
                if right != row["equal"]:
                    sort = "debatable" if "note" in row else "wrongly right" if right else "wrongly wrong"
                    wrong[sort] += 1
                    if name == "capcur_jax" and sort != "debatable":
                        print(f"  {sort}: gold {row['gold']!r}, predicted {row['predicted']!r}")
            late = sorted(seconds)[int(0.95 * len(seconds))]
            times = f"median {1e3 * statistics.median(seconds):.2f} ms, 95 % {1e3 * late:.1f} ms"
            counts = ", ".join(f"{wrong[sort]} {sort}" for sort in ("wrongly right", "wrongly wrong", "debatable"))
            print(f"{name}: {len(rows)} pairs, {counts}; {times}, longest {max(seconds):.2f} s")
            figures[name] = {
                "wrongly_right": wrong["wrongly right"], "wrongly_wrong": wrong["wrongly wrong"],
                "median_ms": 1e3 * statistics.median(seconds), "late_ms": 1e3 * late,
            }  # fmt: skip
    judged = sum("note" not in row for row in rows)
    peer = ["math-verify"] if "math-verify" in graders else []
    record.write({"pairs": judged, "graders": figures}, ("capcur_jax/rewards/**", "capcur_jax/answers/**"), peer)


if __name__ == "__main__":
    app.run(main)
