"""Replies -> verdicts and numbers: the rules first, a judge only where they don't decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from capcur_jax.evaluation import rules
from capcur_jax.evaluation.benchmarks.base import MODES, NOTHING, Ask, Benchmark, Reply, Row, Verdict

_ROUNDS = 2  # what a judge can be asked of one reply: its answer, then whether that equals the gold one
_WRONG = Verdict(0.0, "rule")


class Judge(Protocol):
    """What decides where rules don't."""

    def decide_all(self, asks: Sequence[tuple[Row, str, Ask]]) -> list[str | None]:
        """The verdict on each (row, what is read of the reply, what is asked); None: none could be read.

        "letter": a letter of the options; "yes_no": "yes" or "no"; "equal": "same" or "different"; "extract": the
        answer; any of them but "equal" may be NOTHING.
        """
        ...


class Scored(NamedTuple):
    """A score. verdicts: of the rows in their order. numbers: the benchmark's, in per cent, and the counts.

    Shares are of all rows: decided by `rule`, by `judge`, `undecided` (by neither), `cut` (a thought or box that does
    not close) and `failed` (no reply); the last two count as wrong by rule.
    """

    verdicts: list[Verdict]
    numbers: dict[str, Any]
    shares: dict[str, float]


def score(
    benchmark: Benchmark,
    rows: Sequence[Row],
    replies: Sequence[Reply],
    mode: str,
    read: str = "raw",
    judge: Judge | None = None,
) -> Scored:
    """Scores one reply to each row.

    Args:
      mode: "official" or "kit".
      read: what of a reply is read, one of rules.READINGS, unless the benchmark's rules need one of them.
      judge: without one, what rules don't decide is undecided and counts as wrong.
    """
    if mode not in MODES or read not in rules.READINGS:
        raise ValueError(f"mode {mode!r} is one of {MODES}, read {read!r} one of {rules.READINGS}")
    rule, read = getattr(benchmark, mode), benchmark.reading or read
    texts = [rules.read(reply.text, read) for reply in replies]
    cut = [
        bool(reply.text.strip()) and (not text if read == "box" else mode == "kit" and rules.is_cut_thought(text))
        for reply, text in zip(replies, texts, strict=True)
    ]
    found: list[Verdict | Ask] = []
    for row, reply, text, is_cut in zip(rows, replies, texts, cut, strict=True):
        if reply.failed or is_cut:
            found.append(_WRONG)
            continue
        verdict = rule(row, text, reply.extracted)
        if isinstance(verdict, Ask) and verdict.kind == "extract" and read == "box" and rules.is_boxed(reply.text):
            verdict = _of_box(rule, row, text, verdict)
        if reply.extracted is not None and isinstance(verdict, Verdict) and verdict != rule(row, text, None):
            verdict = verdict._replace(by="judge")  # whoever extracted it
        found.append(verdict)
    for _ in range(_ROUNDS):
        open_ = [place for place, verdict in enumerate(found) if isinstance(verdict, Ask)]
        asks = [(rows[place], texts[place], found[place]) for place in open_]
        said = judge.decide_all(asks) if judge and asks else [None] * len(asks)
        for place, (row, text, ask), word in zip(open_, asks, said, strict=True):
            found[place] = _judged(rule, row, text, ask, word)
    verdicts = [verdict if isinstance(verdict, Verdict) else Verdict(0.0, "none") for verdict in found]
    count = len(verdicts)
    numbers = benchmark.metrics(rows, verdicts, mode)
    undecided = sum(verdict.by == "none" for verdict in verdicts)
    shares = {by: sum(verdict.by == by for verdict in verdicts) for by in ("rule", "judge")}
    shares |= {"undecided": undecided, "cut": sum(cut), "failed": sum(bool(reply.failed) for reply in replies)}
    numbers = {
        "score": numbers["score"],
        "right": sum(verdict.credit >= 1 for verdict in verdicts),
        "rows": count,
        "undecided": undecided,
        **numbers,
    }
    return Scored(verdicts, _plain(numbers), {name: value / count for name, value in shares.items()} if count else {})


def _of_box(rule: Any, row: Row, text: str, ask: Ask) -> Verdict | Ask:
    """What stands in a box is an extraction by itself: it may be right, and else needs no judge to find it again."""
    verdict = rule(row, text, text)
    if isinstance(verdict, Verdict):
        return verdict._replace(by="rule") if verdict.credit == 1 else ask
    return verdict if verdict.kind == "equal" else ask


def _judged(rule: Any, row: Row, text: str, ask: Ask, word: str | None) -> Verdict | Ask:
    """The verdict that a judge's word makes."""
    if word is None:
        return Verdict(0.0, "none")
    if word == NOTHING:
        verdict = rule(row, text, word) if ask.kind == "yes_no" else None  # it may be right: no figure was shown
        return Verdict(verdict.credit if isinstance(verdict, Verdict) else 0.0, "judge")
    if ask.kind == "extract":
        verdict = rule(row, text, word)
        return verdict._replace(by="judge") if isinstance(verdict, Verdict) else verdict
    if ask.kind == "equal":
        return Verdict(float(word == "same"), "judge", ask.answer)
    answer = word.capitalize() if ask.kind == "yes_no" else word
    return Verdict(float(answer in row.gold), "judge", answer)


def _plain(numbers: Any) -> Any:
    """Rounded to six decimals; None of what has no value."""
    if isinstance(numbers, dict):
        return {str(name): _plain(value) for name, value in numbers.items()}
    if isinstance(numbers, float):
        return round(numbers, 6) if math.isfinite(numbers) else None
    return numbers
