"""The same questions answered by base, merged and staged, where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capcur_jax.data.problem import stable_hash
from capcur_jax.evaluation import folders
from capcur_jax.evaluation.benchmarks.base import MODES
from capcur_jax.evaluation.folders import Answered
from capcur_jax.evaluation.page import Room
from capcur_jax.grid.report.gather import BASE_FOLDER, Grid, Run
from capcur_jax.report import pictures

SHOWN = ("base", "merged", "staged")
MOST = 120  # questions on the page
PICTURES = 4 << 20  # bytes of all pictures together
SEEDS = 3  # that examples are taken from, at most


class Example(NamedTuple):
    """A question, and (row, answer, credit) of each that was asked. values: what filters choose by."""

    values: Mapping[str, str]
    index: str
    question: str
    options: tuple[str, ...]
    gold: str
    pictures: Sequence[pictures.Picture]
    more_pictures: int
    answers: Sequence[Mapping[str, Any]]


def choose(grid: Grid) -> tuple[list[Example], int]:
    """At most MOST questions, by the hash of their index, of sets, outcomes and seeds in turn; and of how many."""
    groups: dict[tuple[str, ...], list[tuple[dict[str, str], dict[str, Answered]]]] = {}
    for seed, name, answered in _asked(grid):
        for index in dict.fromkeys(index for some in answered.values() for index in some):
            ones = {row: some[index] for row, some in answered.items() if index in some}
            right = {row: _credit(one) >= 1 for row, one in ones.items()}
            if len(ones) < len(answered) or len(set(right.values())) < 2:
                continue
            if len({(one.row.question, one.row.gold) for one in ones.values()}) > 1:
                continue
            outcome = f"right: {' and '.join(row for row, good in right.items() if good)}"
            values = {"set": name, "outcome": outcome, "seed": str(seed)}
            values["kind"] = next(iter(ones.values())).category
            groups.setdefault((name, outcome, str(seed)), []).append((values, ones))
    for found in groups.values():
        found.sort(key=lambda one: stable_hash("grid", next(iter(one[1].values())).row.index))
    longest = max(map(len, groups.values()), default=0)
    turns = [found[at] for at in range(longest) for found in groups.values() if at < len(found)]
    room = Room(PICTURES)
    return [_example(values, ones, room) for values, ones in turns[:MOST]], len(turns)


def _asked(grid: Grid) -> Iterator[tuple[int, str, dict[str, dict[str, Answered]]]]:
    """(seed, set, row -> its answers), of those of SHOWN that the grid has; nothing of one alone."""
    seeds = [{run.seed: run for run in grid.of(row)} for row in SHOWN[1:]]
    there = [some for some in seeds if some]
    if not there:
        return
    for seed in sorted(set.intersection(*map(set, there)))[:SEEDS]:
        runs = {row: some[seed] for row, some in zip(SHOWN[1:], seeds, strict=True) if some}
        first = next(iter(runs.values()))
        for name in grid.clusters:
            places = {row: _file(run, folders.FINAL, name) for row, run in runs.items()}
            base = _file(first, BASE_FOLDER, name)
            places = {"base": base, **places} if base.is_file() else places
            if len(places) > 1:
                yield seed, name, {row: folders.read_predictions(file) for row, file in places.items()}


def _file(run: Run, moment: str | Path, name: str) -> Path:
    return folders.predictions_file(run.folder / moment, name)


def _credit(one: Answered) -> float:
    return one.verdicts[MODES[0]].credit if MODES[0] in one.verdicts else 0.0


def _example(values: dict[str, str], ones: Mapping[str, Answered], room: Room) -> Example:
    row = next(iter(ones.values())).row
    return Example(
        values,
        row.index,
        row.question,
        tuple(f"{letter}. {text}" for letter, text in row.options.items()),
        " or ".join(row.gold),
        [room.picture(path) for path in row.images[: pictures.MOST]],
        len(row.images) - pictures.MOST,
        [
            {
                "row": name,
                "credit": _credit(one),
                "response": one.reply.failed or one.reply.text,
                "tokens": one.reply.tokens,
                "cut": one.reply.finish == "length",
            }
            for name, one in ones.items()
        ],
    )
