"""A data card: what a problem file holds, counted, with examples and their pictures."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capcur_jax.answers import spelling
from capcur_jax.curation.checking import Rows, rate_histogram
from capcur_jax.data.problem import Problem, stable_hash
from capcur_jax.data.rows import read_rows
from capcur_jax.errors import InputError

MOST_ROWS = 40  # of one table; the others are counted together
_KINDS = 200  # whose examples are remembered; the others' are kept together
_SOURCE = re.compile(r"[a-z][a-z0-9_]{0,40}")
_LICENCE = re.compile(r"Licence: (.+?)\.(?:\s|$)", re.DOTALL)
# Licences of sources without a reader whose docstring states one.
LICENCES = {
    "easy_vqa": "MIT",
    "mathvista": "CC BY-SA 4.0",
    "pope": "MIT",
    "tiny_base": "made by this project",
    "wemath": "CC BY-NC 4.0",
    "word_problems": "made by this project",
}


class Section(NamedTuple):
    """A table with its heading, and bars where it is drawn too. Cells are text and untrusted."""

    heading: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    bars: Mapping[str, float] = {}
    unit: str = "rows"


@dataclasses.dataclass
class Card:
    """All that a page shows."""

    title: str
    facts: dict[str, str]
    sections: list[Section]
    examples: list[Problem]
    summary: dict[str, Any]


def make_card(
    files: Sequence[str | os.PathLike],
    title: str = "",
    examples: int = 12,
    reports: Sequence[str | os.PathLike] = (),
    images: str | os.PathLike | None = None,
    along: Callable[[Iterator], Iterator] = iter,
) -> Card:
    """Reads the files once.

    Args:
      files: JSONL or Parquet files of rows.
      examples: rows that are shown: of every kind in turn, chosen by the hash of their ids.
      reports: what earlier commands printed (their last line, or all of it): rows, kept, dropped by reason.
      images: folder for the images of Parquet files that hold them as bytes (`read_rows`).

    Raises:
      InputError: a file can't be read, or no row is good.
    """
    tally, counts = Rows(shown=3), _Counts(examples)
    for file in files:
        for problem in along(tally.kept(read_rows(file, images=images))):
            counts.add(problem)
    summary = tally.summary()
    if not summary["kept"]:
        first = f" The first trouble: {tally.examples[0].detail}" if tally.examples else ""
        raise InputError(f"{', '.join(map(str, files))}: no usable row to show.{first}")
    facts = {
        "rows": f"{summary['kept']:,}",
        "images": f"{len(counts.images):,}",
        "rows without an image": f"{counts.plain:,}",
        "pass rate, mean": f"{np.mean(counts.rates):.3f}" if counts.rates else "",
        "dropped": f"{sum(summary['dropped'].values()):,}",
    }
    sections = [*counts.sections(), *_dropped(summary), *_earlier(reports)]
    chosen = counts.chosen(examples)
    numbers = {**summary, "images": len(counts.images), "examples": [problem.id for problem in chosen]}
    numbers |= {name: _named(counter) for name, counter in counts.fields.items()}
    name = title or Path(files[0]).stem
    return Card(
        name, {key: fact for key, fact in facts.items() if fact}, [s for s in sections if s.rows], chosen, numbers
    )


class _Counts:
    """What is known of the rows so far, and the rows that may be shown."""

    def __init__(self, examples: int):
        self._most = max(0, examples)
        self.fields = {name: collections.Counter() for name in ("capability", "source", "kind", "answer_type")}
        self._kinds, self._letters = collections.Counter(), collections.Counter()
        self.images: set[str] = set()
        self.plain = 0
        self.rates: list[float] = []
        self._rated_by = collections.Counter()
        self._filter: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
        self._shown: dict[tuple[str, str], list[tuple[int, int, Problem]]] = {}
        self._seen = 0

    def add(self, problem: Problem) -> None:
        for name, counter in self.fields.items():
            counter[getattr(problem, name)] += 1
        self._kinds[problem.capability, problem.kind, problem.source] += 1
        letter = _letter(problem.answer)
        if problem.answer_type == "letter" and letter:
            self._letters[letter] += 1
        self.images.update(problem.images)
        self.plain += not problem.images
        if problem.pass_rate is not None:
            self.rates.append(problem.pass_rate)
            self._rated_by[json.dumps(dict(problem.pass_rate_by), sort_keys=True)[:2000]] += 1
        self._count_filter(problem, letter)
        self._show(problem)

    def _count_filter(self, problem: Problem, answer: str) -> None:
        found = problem.metadata.get("filter")
        for model, said in found.items() if isinstance(found, dict) else ():
            for which in ("image", "caption"):
                known = (str(model), which) in self._filter or len(self._filter) < 2 * MOST_ROWS
                if known and isinstance(said, dict) and which in said:
                    letter = said[which] if isinstance(said[which], str) else ""
                    verdict = "right" if letter and letter.upper() == answer else "wrong" if letter else "no letter"
                    self._filter[str(model), which][verdict] += 1

    def _show(self, problem: Problem) -> None:
        """Keeps, of each kind, the rows whose ids have the smallest hashes."""
        kind = (problem.capability, problem.kind)
        heap = self._shown.setdefault(kind if kind in self._shown or len(self._shown) < _KINDS else ("", ""), [])
        self._seen += 1
        heapq.heappush(heap, (-stable_hash("card", problem.id), self._seen, problem))
        if len(heap) > self._most:
            heapq.heappop(heap)

    def chosen(self, examples: int) -> list[Problem]:
        """A row of each kind in turn, the capabilities taking turns too, until there are enough."""
        turns: list[tuple[int, int, str, Problem]] = []
        seen = collections.Counter()
        for capability, kind in sorted(self._shown):
            rows = sorted(self._shown[capability, kind], reverse=True)
            turns += [(turn, seen[capability], capability, row[2]) for turn, row in enumerate(rows)]
            seen[capability] += 1
        turns.sort(key=lambda turn: turn[:3])
        return sorted((turn[3] for turn in turns[: max(0, examples)]), key=lambda row: (row.capability, row.kind))

    def sections(self) -> list[Section]:
        sources = [(name, count, share, licence_of(name)) for name, count, share in _shares(self.fields["source"])]
        kinds = _shares(self._kinds, 3)
        found = [
            Section("Capabilities", ("capability", "rows", "share"), _shares(self.fields["capability"])),
            Section(
                "Sources",
                ("source", "rows", "share", "licence"),
                sources,
                note="Check a licence where the data come from.",
            ),
            Section("Kinds of question", ("capability", "kind", "source", "rows", "share"), kinds),
            Section("Answers", ("answer type", "rows", "share"), _shares(self.fields["answer_type"])),
        ]
        if self._letters:
            letters = dict(sorted(self._letters.items()))
            most = max(letters.values()) / sum(letters.values())
            rows = [(letter, count, _percent(count, sum(letters.values()))) for letter, count in letters.items()]
            note = f"Always giving the most frequent letter would be right in {most:.1%} of these rows."
            found.append(Section("Letters of multiple choice", ("letter", "rows", "share"), rows, note, letters))
        if self.rates:
            found += self._rate_sections()
        rows = [
            (
                model,
                {"image": "image alone", "caption": "caption alone"}[which],
                *(said[v] for v in ("right", "wrong", "no letter")),
            )
            for (model, which), said in self._filter.items()
        ]
        note = "What each filter model answered from the image alone and from the caption alone."
        return [
            *found,
            Section("Perception-sensitive filter", ("model", "given", "right", "wrong", "no letter"), rows, note),
        ]

    def _rate_sections(self) -> list[Section]:
        rates = np.array(self.rates)
        histogram = rate_histogram(rates)
        edges, counts = histogram["edges"], histogram["counts"]
        bins = {f"{low:.1f}-{high:.1f}": count for low, high, count in zip(edges, edges[1:], counts, strict=False)}
        rows = [(label, count, _percent(count, len(rates))) for label, count in bins.items()]
        note = f"{int((rates <= 0).sum()):,} rows are never answered right (0), {int((rates >= 1).sum()):,} always (1)."
        bars = {label.split("-")[0]: count for label, count in bins.items()}
        by = [(_provenance(json_text), count) for json_text, count in self._rated_by.most_common(MOST_ROWS)]
        return [
            Section("Pass rates", ("pass rate", "rows", "share"), rows, note, bars),
            Section("Where the pass rates come from", ("by", "rows"), by),
        ]


def licence_of(source: str) -> str:
    """The licence of a source: what its reader's docstring says, else LICENCES, else ""."""
    name = source.strip().lower().replace("-", "_")
    if not _SOURCE.fullmatch(name):
        return ""
    module = f"capcur_jax.data.sources.{name}"
    said = None
    if importlib.util.find_spec(module) is not None:
        said = _LICENCE.search(importlib.import_module(module).__doc__ or "")
    return " ".join(said[1].split()) if said else LICENCES.get(name, "")


def _letter(answer: str) -> str:
    found = spelling.words(spelling.normalize(answer[:20]))
    return found[0].upper() if found and len(found) == 1 and len(found[0]) == 1 else ""


def _named(counter: collections.Counter) -> dict[str, int]:
    return {name[:80] or "(none)": count for name, count in counter.most_common(MOST_ROWS)}


def _percent(count: int, total: int) -> str:
    return f"{count / max(1, total):.1%}"


def _shares(counter: collections.Counter, columns: int = 1) -> list[tuple]:
    """Rows of a table: the value (`columns` of them), its count and share. None where there is nothing but ""."""
    empty = ("",) * columns if columns > 1 else ""
    if not set(counter) - {empty}:
        return []
    total, rows = counter.total(), []
    for value, count in counter.most_common(MOST_ROWS):
        cells = value if isinstance(value, tuple) else (value,)
        rows.append((*(cell[:80] or "-" for cell in cells), count, _percent(count, total)))
    rest = total - sum(row[columns] for row in rows)
    return [*rows, ("(others)", *[""] * (columns - 1), rest, _percent(rest, total))] if rest else rows


def _provenance(json_text: str) -> str:
    try:
        values = json.loads(json_text)
    except ValueError:  # cut
        return json_text
    return ", ".join(f"{key}: {value}" for key, value in values.items()) or "not said"


def _dropped(summary: Mapping[str, Any]) -> list[Section]:
    firsts: dict[str, str] = {}
    for drop in summary["dropped_examples"]:
        firsts.setdefault(drop["reason"], f"{os.path.basename(drop['where'])}: {drop['detail']}")
    rows = [(reason, count, firsts.get(reason, "")) for reason, count in summary["dropped"].items()]
    return [Section("Rows left out here", ("reason", "rows", "the first"), rows)]


def _earlier(reports: Sequence[str | os.PathLike]) -> list[Section]:
    """What earlier steps left out, from the JSON that they printed."""
    rows: list[tuple] = []
    for path in map(Path, reports):
        report = _last_json(path)
        if not isinstance(report.get("dropped"), dict):
            raise InputError(f"{path}: no `dropped` in its JSON; give what a command of capcur_jax.data printed")
        kept, read = report.get("kept", ""), report.get("rows", "")
        reasons = "; ".join(f"{reason}: {count}" for reason, count in list(report["dropped"].items())[:MOST_ROWS])
        rows.append((path.stem, read, kept, reasons))
    return [Section("How it was made", ("step", "rows", "kept", "left out"), rows)]


def _last_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable ({error}); give a file that a command's output was saved to") from None
    for candidate in (text, *reversed(text.strip().splitlines()[-1:])):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    raise InputError(f"{path}: neither it nor its last line is a JSON object; save what the command printed")
