"""What problem files hold, and what in them a run could not use: `check`, one pass, no image kept in memory."""

from __future__ import annotations

import array
import collections
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from capcur_jax.answers.kinds import gold_of
from capcur_jax.answers.spelling import ANSWER_LENGTH, normalize, words
from capcur_jax.curation.fingerprints import Fingerprint, Images, spelling
from capcur_jax.data import golds
from capcur_jax.data.problem import BadRow, Drop, Problem
from capcur_jax.data.rows import Tally, read_rows
from capcur_jax.models.inputs import BadImage, BadInput
from capcur_jax.rewards.compare import decide

if TYPE_CHECKING:  # it brings JAX
    from capcur_jax.models.batching import PromptSize

MOST_VALUES = 50  # distinct values of a field that are reported; the others are counted together
RATE_EDGES = [i / 10 for i in range(11)]


class Rows(Tally):
    """A tally that names the first dropped rows of each reason, and the first repaired ones of each sort."""

    def __init__(self, shown: int = 5):
        super().__init__(shown)
        self.repairs: list[dict[str, str]] = []

    def repair(self, problem: Problem) -> None:
        for what in problem.repaired:
            if self.repaired[what] < self.shown:
                self.repairs.append({"where": f"id {_short(problem.id)}", "detail": _repair(problem, what)})
        super().repair(problem)

    def drop(self, drop: Drop) -> None:
        if self.dropped[drop.reason] < self.shown:
            self.examples.append(drop)
        self.dropped[drop.reason] += 1

    def summary(self) -> dict[str, Any]:
        repaired = {"repaired_examples": self.repairs} if self.repairs else {}
        examples = [drop._asdict() for drop in self.examples]
        return {**super().summary(), "dropped_examples": examples, **repaired}


def _repair(problem: Problem, what: str) -> str:
    return f"{what}: `answer` is read as {_short(problem.answer)}" if problem.answer else what


def check(
    files: Sequence[str | os.PathLike],
    measure: Callable[[Problem], PromptSize],
    max_tokens: int,
    examples: int = 5,
    images: str | os.PathLike | None = None,
    along: Callable[[Iterator], Iterator] = iter,
) -> dict[str, Any]:
    """Reads the files once and counts.

    Args:
      files: JSONL or Parquet files of rows.
      measure: gives the prompt's tokens; `PromptBuilder.measure` of a builder without limits.
      max_tokens: a longer prompt would be left out of a run.
      examples: findings of each sort that are named; all are counted.
      images: folder for the images of Parquet files that hold them as bytes (`read_rows`).
      along: passes the rows on, for a display of the progress.

    Returns:
      JSON values: `rows`, `kept`, `dropped` (by reason), `usable` (kept rows that a run would not leave out and could
      reward), and a key for each thing that is counted; docs/data_checks.md lists them.

    Raises:
      InputError: a file can't be read at all.
    """
    report = _Report(max_tokens, examples)
    fingerprints, tally = Images(), Rows(examples)
    empty: list[str] = []

    def rows() -> Iterator[tuple[str, Problem]]:
        for file in files:
            before = tally.rows
            for problem in tally.kept(read_rows(file, images=images)):
                yield str(file), problem
            if tally.rows == before:
                empty.append(str(file))

    for (file, problem), found in fingerprints.along(along(rows()), lambda row: row[1].images):
        report.add(file, problem, found, measure)
    found = report.summary()
    return {"files": [str(file) for file in files], "empty_files": empty, **tally.summary(), **found}


def unanswerable(problem: Problem) -> Drop | None:
    """Why no response to the problem could be graded as right, or None. SFT rows without an answer are fine.

    The reader refuses most of it; a Problem that was made otherwise is looked at in the same way.
    """
    if not problem.answer and problem.response is not None:
        return None
    given = problem.answers or (problem.answer,)
    try:
        golds.accepted([("answer", answer) for answer in given], problem.problem, problem.answer_type)
    except BadRow as error:
        return Drop(problem.id, *error.args)
    gold = gold_of(problem.answer, problem.answers, problem.answer_type, problem.problem)
    for answer in given:
        if decide(answer, gold) is not True:
            what = f"the grader does not take {_short(answer)} for itself; write it in another way"
            return Drop(problem.id, "answer not graded as right", what)
    return None


class _Findings:
    """Counts rows of one sort and names the first few."""

    def __init__(self, examples: int):
        self.rows, self.reasons, self._most = 0, collections.Counter(), examples
        self.examples: list[dict[str, str]] = []

    def add(self, file: str, problem: Problem, detail: str, reason: str = "") -> None:
        self.rows += 1
        self.reasons[reason] += 1
        if self.reasons[reason] <= self._most:
            self.examples.append({"where": f"{file}, id {_short(problem.id)}", "detail": _short(detail, 300)})

    def summary(self) -> dict[str, Any]:
        reasons = {"reasons": dict(self.reasons.most_common())} if any(self.reasons) else {}
        return {"rows": self.rows, **reasons, "examples": self.examples}


class _Report:
    """What is known of the rows so far; of each row some bytes are kept, whatever it holds."""

    def __init__(self, max_tokens: int, examples: int):
        self._max_tokens = max_tokens
        self._counts = {
            name: collections.Counter() for name in ("capability", "source", "kind", "answer_type", "images")
        }
        names = ("same_id", "same_question", "conflicting_answers", "broken", "flawed", "prompts", "overlong")
        self._found = {name: _Findings(examples) for name in (*names, "unanswerable")}
        self._files_by_id: dict[str, str] = {}
        self._questions: dict[bytes, tuple[str, str]] = {}  # -> id, answer
        self._broken: dict[str, str] = {}  # path -> what is wrong
        self._sizes: dict[str, tuple[int, int]] = {}  # path -> height, width
        self._tokens, self._rates = array.array("q"), array.array("d")
        self._usable = 0

    def add(self, file: str, problem: Problem, images: list[Fingerprint | str], measure: Callable) -> None:
        fields = (problem.capability, problem.source, problem.kind, problem.answer_type, str(len(problem.images)))
        for counter, value in zip(self._counts.values(), fields, strict=True):
            counter[value] += 1
        if problem.pass_rate is not None:
            self._rates.append(problem.pass_rate)
        good = self._images(file, problem, images)
        self._duplicates(file, problem, images)
        good = good and self._prompt(file, problem, measure)
        why = unanswerable(problem)
        if why:
            self._found["unanswerable"].add(file, problem, why.detail, why.reason)
        self._usable += good and not why

    def _images(self, file: str, problem: Problem, images: list[Fingerprint | str]) -> bool:
        good = True
        for path, image in zip(problem.images, images, strict=True):
            if isinstance(image, str):
                self._break(file, problem, path, image, first=good)
                good = False
            else:
                self._sizes[path] = (image.height, image.width)
                if image.flaw:
                    self._found["flawed"].add(file, problem, f"{path}: {image.flaw}", image.flaw)
        return good

    def _break(self, file: str, problem: Problem, path: str, what: str, first: bool) -> None:
        self._broken.setdefault(path, what)
        if first:
            self._found["broken"].add(file, problem, what)

    def _duplicates(self, file: str, problem: Problem, images: list[Fingerprint | str]) -> None:
        other = self._files_by_id.setdefault(problem.id, file)
        if other != file:
            self._found["same_id"].add(file, problem, f"{other} has this id too; give each row its own")
        parts = [spelling(problem.problem).encode()]
        parts += [
            image.pixels if isinstance(image, Fingerprint) else b"?" + path.encode("utf-8", "replace")
            for image, path in zip(images, problem.images, strict=True)
        ]
        answer = " ".join(words(normal := normalize(problem.answer[:ANSWER_LENGTH])) or (normal,))
        key = hashlib.blake2b(b"\0".join(parts), digest_size=16).digest()
        first_id, first_answer = self._questions.setdefault(key, (problem.id, answer))
        if first_id != problem.id:
            self._found["same_question"].add(file, problem, f"the question and images of {_short(first_id)}")
            if first_answer != answer:
                what = f"the question and images of {_short(first_id)}, and another answer"
                self._found["conflicting_answers"].add(file, problem, what)

    def _prompt(self, file: str, problem: Problem, measure: Callable) -> bool:
        """Whether a run would take the prompt; the images are known to be good."""
        if any(path in self._broken for path in problem.images):
            return False
        try:
            tokens = measure(problem).tokens
        except BadImage as error:  # too narrow for the model, for example
            self._break(file, problem, problem.images[0], str(error), first=True)
            return False
        except BadInput as error:
            self._found["prompts"].add(file, problem, str(error))
            return False
        self._tokens.append(tokens)
        if tokens > self._max_tokens:
            self._found["overlong"].add(
                file, problem, f"the prompt has {tokens} tokens, the limit is {self._max_tokens}"
            )
        return tokens <= self._max_tokens

    def summary(self) -> dict[str, Any]:
        found = {name: findings.summary() for name, findings in self._found.items()}
        broken = [
            {"image": path, "detail": _short(what, 300)} for path, what in list(self._broken.items())[:MOST_VALUES]
        ]
        rates = np.array(self._rates)
        sides = np.array([max(size) for size in self._sizes.values()], np.int64)
        pixels = np.array([height * width for height, width in self._sizes.values()], np.int64)
        return {
            "usable": int(self._usable),
            "counts": {name: most_common(counter) for name, counter in self._counts.items()},
            "duplicates": {name: found[name] for name in ("same_id", "same_question", "conflicting_answers")},
            "broken_images": {"images": len(self._broken), **found["broken"], "paths": broken},
            "flawed_images": found["flawed"],
            "unusable_prompts": found["prompts"],
            "overlong_prompts": {"max_tokens": self._max_tokens, **found["overlong"]},
            "unanswerable": found["unanswerable"],
            "prompt_tokens": statistics_of(np.array(self._tokens, np.int64)),
            "images": {
                "distinct_paths": len(self._sizes),
                "longer_side": statistics_of(sides),
                "pixels": statistics_of(pixels, edges=False),
            },
            "pass_rate": {
                **statistics_of(rates, edges=False),
                "all_wrong": int((rates <= 0).sum()),
                "all_right": int((rates >= 1).sum()),
                "histogram": rate_histogram(rates),
            },
        }


def most_common(counter: collections.Counter[str]) -> dict[str, int]:
    """The most frequent values and their counts; what is left is counted under "(others)"."""
    shown = {_short(value, 80) if value else "(none)": count for value, count in counter.most_common(MOST_VALUES)}
    rest = counter.total() - sum(count for _, count in counter.most_common(MOST_VALUES))
    return {**shown, "(others)": rest} if rest else shown


def statistics_of(values: np.ndarray, edges: bool = True) -> dict[str, Any]:
    """Count, mean and quantiles of numbers; with `edges` a histogram whose bins are powers of two and half-way."""
    if not len(values):
        return {"count": 0}
    quantiles = zip(("min", "median", "p95", "max"), np.quantile(values, (0, 0.5, 0.95, 1)), strict=True)
    summary = {"count": len(values), "mean": round(float(values.mean()), 4)}
    summary |= {name: round(float(value), 4) for name, value in quantiles}
    if edges:
        ladder = [0, *sorted(n for k in range(3, 40) for n in (2**k, 3 * 2 ** (k - 1)))]
        low = max(i for i, edge in enumerate(ladder) if edge <= values.min())
        high = min(i for i, edge in enumerate(ladder) if edge > values.max())
        summary["histogram"] = _histogram(values, ladder[low : high + 1])
    return summary


def rate_histogram(rates: np.ndarray) -> dict[str, list]:
    """Pass rates in tenths; 1 falls in the last."""
    return _histogram(rates, RATE_EDGES)


def _histogram(values: np.ndarray, edges: list[float]) -> dict[str, list]:
    return {"edges": edges, "counts": np.histogram(values, edges)[0].tolist()}


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
