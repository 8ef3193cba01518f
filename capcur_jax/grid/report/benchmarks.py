"""Public benchmarks that `capcur_jax.evaluate` asked the runs of a grid, by the statistics of the grid's own sets.

RUN/evaluation/benchmarks is that command's work directory for a run's checkpoint, GRID/base/benchmarks for the base.
Verdicts are those of VLMEvalKit's rules, as the paper's.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capcur_jax.errors import InputError
from capcur_jax.evaluation import comparison, folders, statistics
from capcur_jax.evaluation.benchmarks import registry
from capcur_jax.evaluation.benchmarks.base import Row, Verdict
from capcur_jax.grid.report.claims import Measures
from capcur_jax.grid.report.gather import Figures, Grid
from capcur_jax.grid.rows import BASE, ROWS

FOLDER, OF_BASE = Path("evaluation", "benchmarks"), Path("base", "benchmarks")  # in a run's folder; in a grid's
MODE = "kit"
VISUAL = ("mathvista", "mathvision", "mathverse_vision_intensive", "wemath")
PERCEPTION = ("aokvqa", "realworldqa", "mmstar", "pope")
_NEAR = 0.01  # per cent: what credits of six digits may lose
_APART = {*comparison.THE_MODELS, "seed"}  # conditions that differ from run to run


@dataclasses.dataclass(frozen=True)
class Asked:
    """A run's table of one benchmark. rows: by what tells a question: its index, text and right answers."""

    rows: Mapping[tuple[str, str, tuple[str, ...]], Row]
    verdicts: Sequence[Verdict]
    conditions: Mapping[str, Any]


class Measured:
    """What the runs of a grid scored, by benchmark."""

    def __init__(self, grid: Grid):
        tables: dict[Any, Any] = {}
        self._runs = {(run.row, run.seed): _read(run.folder / FOLDER, tables) for run in grid.runs}
        bases = dict.fromkeys(run.folder.resolve().parent.parent / OF_BASE for run in grid.runs)
        found = [(place, _read(place, tables)) for place in bases if (place / folders.SCORES).is_file()]
        if len(found) > 1:
            raise InputError(f"{found[0][0]} and {found[1][0]}: both are the base's benchmarks; keep one of them")
        self._base = found[0][1] if found else {}
        self.names = [name for name in registry.ORDER if any(name in one for one in self._all())]
        asked = {row for (row, _), one in self._runs.items() if one} | ({BASE.name} if self._base else set())
        self.rows = [row for row in (BASE.name, *ROWS) if row in asked]
        self.notes = [note for name in self.names for note in self._notes(name)]

    def _all(self) -> list[Mapping[str, Asked]]:
        return [*self._runs.values(), self._base]

    @functools.cache  # noqa: B019 (lives as long as the page is made)
    def measures(self, names: tuple[str, ...]) -> Measures:
        """Of the runs that were asked all of these benchmarks."""
        having = [run for run, one in self._runs.items() if all(name in one for name in names)]
        base = self._base if all(name in self._base for name in names) else {}
        rows: dict[str, Figures] = {}
        credit, clusters = {}, {}
        for name in names:
            asked = [self._runs[run][name] for run in having] + ([base[name]] if base else [])
            credit[name], clusters[name] = _credit(name, asked) if asked else (np.zeros((0, 0)), [])
        nothing = {name: np.full_like(some, np.nan) for name, some in credit.items()}
        if base:
            rows[BASE.name] = Figures((), *({k: v[-1:] for k, v in part.items()} for part in (credit, nothing)))
        for row in ROWS:
            of = sorted((seed, at) for at, (other, seed) in enumerate(having) if other == row)
            if of:
                seeds, places = zip(*of, strict=True)
                parts = ({k: v[list(places)] for k, v in part.items()} for part in (credit, nothing))
                rows[row] = Figures(seeds, *parts)
        return Measures(Grid((), (), rows, clusters if rows else {}, {}, ()))

    def _notes(self, name: str) -> list[str]:
        """What has to be known beside a benchmark's figures."""
        having = [run for run, one in self._runs.items() if name in one]
        without = [f"{row} seed {seed}" for row, seed in self._runs if (row, seed) not in having]
        without += [] if name in self._base else ["the base"]
        asked = [one[name] for one in self._all() if name in one]
        notes = [f"{name}: not asked of {', '.join(without)}"] if without else []
        if left := len(set().union(*(one.rows for one in asked))) - len(_common(asked)):
            notes.append(f"{name}: {left:,} questions that not all were asked are left out")
        for key in dict.fromkeys(key for one in asked for key in one.conditions if key not in _APART):
            values = {json.dumps(one.conditions.get(key), sort_keys=True) for one in asked}
            if len(values) > 1:
                notes.append(f"{name}: asked with different {key}: {', '.join(sorted(values))[:200]}")
        if any(one.conditions.get("partial") for one in asked):
            notes.append(f"{name}: a part of its questions (--limit)")
        return notes


def _read(folder: Path, tables: dict[Any, Any]) -> dict[str, Asked]:
    """{} of a folder that is not there. A table with a content that was read before is not read again."""
    if not (folder / folders.SCORES).is_file():
        return {}
    scores, found = folders.read_scores(folder).get("benchmarks") or {}, {}
    for file in sorted((folder / folders.PREDICTIONS).glob("*.tsv")):
        if file.stem not in registry.benchmarks():
            continue  # a file of the user's own
        told = scores.get(file.stem) or {}
        digest = hashlib.sha256(file.read_bytes()).digest()
        if digest not in tables:
            rows, verdicts = _table(file, told.get(MODE) or {})
            tables[digest] = tables.setdefault((file.stem, tuple(rows)), rows), verdicts  # rows are kept once
        found[file.stem] = Asked(*tables[digest], told.get("conditions") or {})
    return found


def _table(file: Path, scored: Mapping[str, Any]) -> tuple[dict, list[Verdict]]:
    """Raises InputError: a row without a verdict, or a score that its rows do not give. Tables hold no empty facts."""
    rows, verdicts = {}, []
    for index, one in folders.read_predictions(file).items():
        if MODE not in one.verdicts:
            raise InputError(f"{file}: row {index} has no verdict of {MODE}; evaluate again with the same --workdir")
        facts = collections.defaultdict(str, {key: _restored(value) for key, value in one.row.facts.items()})
        rows[index, one.row.question, one.row.gold] = Row(index, "", one.row.gold, facts=facts, cluster=one.row.cluster)
        verdicts.append(one.verdicts[MODE])
    score, told = _score(file.stem, list(rows.values()), verdicts), scored.get("score")
    if not isinstance(told, (int, float)) or abs(score - told) > _NEAR:
        raise InputError(
            f"{file}: its rows give {score:.2f}, {folders.SCORES} has {told}; evaluate again with the same --workdir"
        )
    return rows, verdicts


def _restored(value: Any) -> Any:
    """A fact as it was before a table's cell held it as JSON."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _score(name: str, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> float:
    return float(registry.get(name).metrics(rows, verdicts, MODE)["score"]) if rows else 0.0


def _common(asked: Sequence[Asked]) -> list:
    """Questions that all were asked, in the first one's order."""
    every = set.intersection(*({*one.rows} for one in asked))
    return [key for key in asked[0].rows if key in every]


def _credit(name: str, asked: Sequence[Asked]) -> tuple[np.ndarray, list[str]]:
    """([tables, n], [n] clusters) whose means are the scores, as shares: of questions, or of groups of clusters.

    A score that is no mean of questions (POPE's F1, WeMath's) has for each of at most statistics.GROUPS groups what the
    group adds to it: the variance of their mean is the jackknife's, and they are paired as questions are.
    """
    common = _common(asked)
    if not common:
        raise InputError(f"{name}: the runs were asked no question in common; ask each of them the same")
    verdicts = []
    for one in asked:
        by_key = dict(zip(one.rows, one.verdicts, strict=True))
        verdicts.append([by_key[key] for key in common])
    rows = [asked[0].rows[key] for key in common]
    clusters = [row.cluster or f"{name} {row.index}" for row in rows]
    credit = np.array([[verdict.credit for verdict in some] for some in verdicts])
    scores = np.array([_score(name, rows, some) for some in verdicts]) / 100
    if (abs(credit.mean(1) - scores) < _NEAR / 100).all():
        return credit, clusters
    group = _groups(clusters)
    count = int(group.max()) + 1
    if count < 2:
        raise InputError(f"{name}: its questions are of one group; a score like this needs several")
    parts = np.empty((len(asked), count))
    for left_out in range(count):
        kept = np.flatnonzero(group != left_out)
        for at, some in enumerate(verdicts):
            parts[at, left_out] = _score(name, [rows[n] for n in kept], [some[n] for n in kept]) / 100
    parts = scores[:, None] + (count - 1) * (parts.mean(1, keepdims=True) - parts)
    return parts, [f"{name} group {at}" for at in range(count)]


def _groups(clusters: Iterable[str]) -> np.ndarray:
    """[questions]: the number of the group that each question's cluster is in."""
    numbers: dict[str, int] = {}
    of = np.array([numbers.setdefault(one, len(numbers)) for one in clusters])
    shuffled = np.random.default_rng(0).permutation(len(numbers))
    return shuffled[of] % min(len(numbers), statistics.GROUPS)
