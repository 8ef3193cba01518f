"""Reads the runs of a grid: what they are, how far they came, and the answer to every question of their final weights.

Texts of answers are dropped again: a hundred runs have a million of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capcur_jax.errors import InputError
from capcur_jax.evaluation import comparison, folders
from capcur_jax.evaluation.benchmarks.base import MODES
from capcur_jax.grid.rows import BASE, ROWS
from capcur_jax.records import jsonl

BASE_FOLDER = Path("evaluation", "base")
METRICS = "metrics.jsonl"
KNOWN = {BASE.name: BASE, **ROWS}
_CONDITIONS = ("seed",)  # of an evaluation, which differ from run to run


@dataclasses.dataclass(frozen=True)
class Answers:
    """Of one run to one set, in the order of its table.

    keys: what tells a question: its index, text and right answers. credit, tokens: [questions], tokens nan where not
    known. clusters, kinds: [questions].
    """

    keys: tuple[tuple[str, int], ...]
    credit: np.ndarray
    tokens: np.ndarray
    clusters: tuple[str, ...]
    kinds: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's records. answers, base: set -> its answers, {} where there are none. conditions, of_base: what these were
    asked with. trouble: why it counts nowhere."""

    row: str
    seed: int
    folder: Path
    summary: Mapping[str, Any]
    versions: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    answers: Mapping[str, Answers]
    base: Mapping[str, Answers]
    conditions: Mapping[str, Any]
    of_base: Mapping[str, Any]
    trouble: str = ""

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Figures:
    """A row's answers to the questions that all runs were asked.

    seeds: of its runs; () of a base that answers alike in all. credit, tokens: set -> [max(1, seeds), questions].
    """

    seeds: tuple[int, ...]
    credit: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Grid:
    """All that the page and the tables are made of.

    runs: those that count. others: those that don't, with their trouble. rows: in the order of the paper's, base first.
    clusters, kinds: set -> [questions]. notes: what has to be known beside all figures.
    """

    runs: tuple[Run, ...]
    others: tuple[Run, ...]
    rows: Mapping[str, Figures]
    clusters: Mapping[str, Sequence[str]]
    kinds: Mapping[str, Sequence[str]]
    notes: tuple[str, ...]

    def of(self, row: str) -> list[Run]:
        return [run for run in self.runs if run.row == row]


def find(places: Sequence[str]) -> list[tuple[str, Path]]:
    """(row, folder) of the runs in grids' work directories and of single runs' folders.

    A run's row is the folder's name or its parent's; else ROW=FOLDER says it. Raises InputError.
    """
    found = []
    for place in places:
        told, _, path = place.partition("=")
        if told not in ROWS:
            told, path = "", place
        folder = Path(path)
        if (folder / METRICS).is_file():
            name = told or next((part for part in reversed(folder.resolve().parts[-2:]) if part in ROWS), "")
            if not name:
                raise InputError(f"{folder}: which row is it? Give ROW={folder}, with one of {', '.join(ROWS)}")
            found.append((name, folder))
            continue
        runs = [(row, file.parent) for row in ROWS for file in (folder / row).glob(f"seed*/{METRICS}")]
        if not runs:
            raise InputError(
                f"{folder}: holds no {METRICS} of a run and no ROW/seedN/{METRICS} of a grid; give a --workdir"
            )
        found += sorted(runs, key=lambda run: (list(ROWS).index(run[0]), len(run[1].name), run[1].name))
    return found


def read(places: Sequence[str]) -> Grid:
    """The runs in these places. Raises InputError: none, two of one row and seed, or a file that can't be read."""
    tables: dict[bytes, Answers] = {}
    runs = [_run(row, folder, tables) for row, folder in find(places)]
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        if run.folder.resolve() != seen.setdefault((run.row, run.seed), run.folder.resolve()):
            raise InputError(f"{run.folder} and {seen[run.row, run.seed]}: both are {run.name}; give one of them")
    runs = list({run.folder.resolve(): run for run in runs}.values())
    counted = tuple(run for run in runs if not run.trouble)
    others = tuple(run for run in runs if run.trouble)
    return _grid(counted, others)


def _run(row: str, folder: Path, tables: dict[bytes, Answers]) -> Run:
    done, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
    seed = config.get("seed", 0)
    if not isinstance(seed, int):
        raise InputError(f"{folder / 'config.json'}: seed is {seed!r}, no whole number")
    try:
        records = jsonl.read_jsonl(folder / METRICS)
    except ValueError as error:
        raise InputError(str(error)) from None
    answers = base = conditions = of_base = {}
    trouble = ""
    if done.get("status") != "finished":
        steps = [record["step"] for record in records if record.get("type") == "step"]
        trouble = f"{done.get('status') or 'not finished'}, step {max(steps, default=0):,}"
    elif not (folder / folders.FINAL / folders.SCORES).is_file():
        trouble = f"no {folders.FINAL}/{folders.SCORES}"
    else:
        answers, conditions = _answers(folder / folders.FINAL, tables)
        if (folder / BASE_FOLDER).is_dir():
            base, of_base = _answers(folder / BASE_FOLDER, tables)
        trouble = "" if answers else f"no {folders.FINAL}/{folders.PREDICTIONS}"
    versions = read_json(folder / "versions.json")
    return Run(row, seed, folder, done, versions, records, answers, base, conditions, of_base, trouble)


def _answers(folder: Path, tables: dict[bytes, Answers]) -> tuple[dict[str, Answers], Mapping[str, Any]]:
    """Set -> its answers, and what they were asked with. A table with a content that was read before is not read."""
    found = {}
    for file in sorted((folder / folders.PREDICTIONS).glob("*.tsv")):
        digest = hashlib.sha256(file.read_bytes()).digest()
        if digest not in tables:
            tables[digest] = _table(file)
        found[file.stem] = tables[digest]
    conditions = read_json(folder / folders.SCORES).get("conditions") or {}
    apart = {*comparison.THE_MODELS, *_CONDITIONS}
    return found, {key: value for key, value in conditions.items() if key not in apart}


def _table(file: Path) -> Answers:
    answered = folders.read_predictions(file)
    missing = next((index for index, one in answered.items() if MODES[0] not in one.verdicts), None)
    if missing is not None:
        raise InputError(f"{file}: row {missing} has no verdict; a reward on a scale of its own has no accuracy")
    ones = list(answered.values())
    tokens = [np.nan if one.reply.failed or one.reply.tokens is None else one.reply.tokens for one in ones]
    return Answers(
        tuple((one.row.index, hash((one.row.question, one.row.gold))) for one in ones),
        np.array([one.verdicts[MODES[0]].credit for one in ones]),
        np.array(tokens, dtype=float),
        tuple(one.row.cluster or f"{file.stem} {one.row.index}" for one in ones),
        tuple(one.category for one in ones),
    )


def _grid(runs: tuple[Run, ...], others: tuple[Run, ...]) -> Grid:
    notes, rows, clusters, kinds = _differences(runs), {}, {}, {}
    chosen: dict[str, list[tuple[str, int]]] = {}
    names = dict.fromkeys(name for run in runs for name in run.answers)
    for name in names:
        if without := [run.name for run in runs if name not in run.answers]:
            notes.append(f"{name}: left out, {', '.join(without)} did not answer it")
            continue
        asked = [one for run in runs for one in (run.answers[name], run.base.get(name)) if one]
        common = set.intersection(*({*one.keys} for one in asked))
        every = set().union(*(one.keys for one in asked))
        if not common:
            raise InputError(f"{name}: the runs were asked no question in common; give runs of one grid")
        if len(common) < len(every):
            notes.append(f"{name}: {len(every) - len(common):,} questions that not all were asked are left out")
        chosen[name] = [key for key in asked[0].keys if key in common]
        order = _places(asked[0], chosen[name])
        clusters[name] = [asked[0].clusters[at] for at in order]
        kinds[name] = [asked[0].kinds[at] for at in order]
    if chosen:
        if bases := _bases(runs, chosen, notes):
            rows[BASE.name] = bases
        for row in dict.fromkeys(run.row for run in sorted(runs, key=lambda run: list(ROWS).index(run.row))):
            of = sorted((run for run in runs if run.row == row), key=lambda run: run.seed)
            rows[row] = _figures(tuple(run.seed for run in of), [run.answers for run in of], chosen)
    return Grid(runs, others, rows, clusters, kinds, tuple(notes))


def _bases(runs: Sequence[Run], chosen: Mapping[str, Any], notes: list[str]) -> Figures | None:
    """What the base answered: once where that is the same in all runs, else seed by seed."""
    having = [run for run in runs if all(name in run.base for name in chosen)]
    if not having:
        return None
    found = _figures(tuple(run.seed for run in having), [run.base for run in having], chosen)
    if all((credit == credit[0]).all() for credit in found.credit.values()):
        return Figures((), *({k: v[:1] for k, v in part.items()} for part in (found.credit, found.tokens)))
    notes.append("the base's answers differ from run to run; of each seed the first run's count")
    by_seed = {run.seed: run.base for run in reversed(having)}
    seeds = tuple(sorted(by_seed))
    return _figures(seeds, [by_seed[seed] for seed in seeds], chosen)


def _figures(seeds: tuple[int, ...], answers: Sequence[Mapping[str, Answers]], chosen: Mapping[str, Any]) -> Figures:
    credit, tokens = {}, {}
    for name, keys in chosen.items():
        places = [_places(one[name], keys) for one in answers]
        credit[name] = np.stack([one[name].credit[at] for one, at in zip(answers, places, strict=True)])
        tokens[name] = np.stack([one[name].tokens[at] for one, at in zip(answers, places, strict=True)])
    return Figures(seeds, credit, tokens)


def _places(answers: Answers, keys: Iterable[tuple[str, int]]) -> list[int]:
    if answers.keys == tuple(keys):
        return list(range(len(answers.keys)))
    at = {key: place for place, key in enumerate(answers.keys)}
    return [at[key] for key in keys]


def _differences(runs: Sequence[Run]) -> list[str]:
    """Conditions of the evaluations, and commits, that are not the same in all runs."""
    notes = []
    for key in dict.fromkeys(key for run in runs for key in run.conditions):
        values = {json.dumps(run.conditions.get(key), sort_keys=True) for run in runs}
        if len(values) > 1:
            notes.append(f"evaluations differ in {key}: {', '.join(sorted(values))[:200]}")
    having = [run for run in runs if run.of_base]
    for key in dict.fromkeys(key for run in having for key in run.conditions):
        pairs = {
            tuple(json.dumps(of.get(key), sort_keys=True) for of in (run.of_base, run.conditions)) for run in having
        }
        told = [f"{base[:90]} (base), {trained[:90]}" for base, trained in sorted(pairs) if base != trained]
        if told:
            notes.append(
                f"the base was asked otherwise than the trained models, {key}: {'; '.join(told)}. What they gain over "
                "it has that in it"
            )
    commits = {str(run.versions["commit"])[:7] for run in runs if run.versions.get("commit")}
    if len(commits) > 1:
        notes.append(f"runs are of {len(commits)} commits: {', '.join(sorted(commits))}")
    return notes


def read_json(file: Path) -> dict[str, Any]:
    """{} of a file that is not there. Raises InputError for one that is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise InputError(f"{file}: no JSON ({error}); repair or delete it") from None
    return found if isinstance(found, dict) else {}
