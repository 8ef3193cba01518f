"""Whether two evaluations differ by more than chance: paired differences on the questions that both were asked."""

from __future__ import annotations

import dataclasses
import statistics as means
from collections.abc import Mapping, Sequence
from typing import Any

from capcur_jax.errors import InputError
from capcur_jax.evaluation import statistics
from capcur_jax.evaluation.benchmarks.base import MODES
from capcur_jax.evaluation.folders import Answered, Folder, conditions, score_of

# Conditions under which answers differ though the models may not. What tells the models themselves is not among them.
THE_MODELS = (
    "checkpoint", "model", "address", "workdir", "versions", "step", "stage", "moment", "spent",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two evaluations on one benchmark: `b` against `a`, on the questions of both.

    right: the paired difference of credit, per question from 0 to 1. tokens: that of response lengths, None where one
        of them counted none. p_holm: `right.p` adjusted over the benchmarks of these two evaluations.
    only: questions of one alone. other_questions: those whose text or right answer differs, which are left out.
    conditions: key -> (a's, b's), where they differ.
    """

    benchmark: str
    right: statistics.Paired
    tokens: statistics.Paired | None
    lengths: tuple[Mapping[str, Any], Mapping[str, Any]]
    scores: tuple[float | None, float | None]
    only: tuple[int, int]
    other_questions: int
    conditions: Mapping[str, tuple[Any, Any]]
    p_holm: float = 1.0


def compare(a: Folder, b: Folder, mode: str) -> list[Pair]:
    """A pair for each benchmark of both, in `a`'s order.

    Args:
      mode: of base.MODES.

    Raises:
      InputError: they have no benchmark, or no question of one, in common.
    """
    if mode not in MODES:
        raise InputError(f"--mode {mode}: choose one of {', '.join(MODES)}")
    names = [name for name in a.answered if name in b.answered]
    if not names:
        raise InputError(f"{a.path} and {b.path} have no benchmark in common")
    pairs = [_pair(a, b, name, mode) for name in names]
    adjusted = statistics.holm([pair.right.p for pair in pairs])
    return [dataclasses.replace(pair, p_holm=p) for pair, p in zip(pairs, adjusted, strict=True)]


def _pair(a: Folder, b: Folder, name: str, mode: str) -> Pair:
    left, right = a.answered[name], b.answered[name]
    both = [index for index in left if index in right]
    same = [index for index in both if _same(left[index], right[index])]
    if not same:
        raise InputError(f"{a.path} and {b.path} have no question of {name} in common; evaluate both on the same rows")
    lefts, rights = [left[index] for index in same], [right[index] for index in same]
    clusters = [one.cluster for one in lefts]
    known = all(one.reply.tokens is not None for one in (*lefts, *rights))
    tokens = [[float(one.reply.tokens or 0) for one in ones] for ones in (lefts, rights)]
    return Pair(
        benchmark=name,
        right=statistics.paired_difference(_credits(a, lefts, mode), _credits(b, rights, mode), clusters),
        tokens=statistics.paired_difference(*tokens, clusters, bounded=False) if known else None,
        lengths=(lengths(lefts, mode), lengths(rights, mode)),
        scores=(score_of(a, name, mode), score_of(b, name, mode)),
        only=(len(left) - len(both), len(right) - len(both)),
        other_questions=len(both) - len(same),
        conditions=_different(conditions(a, name), conditions(b, name)),
    )


def lengths(answered: Sequence[Answered], mode: str) -> dict[str, Any]:
    """Means of response lengths in tokens, end token included; None where nothing is known.

    Returns:
      tokens, tokens_right (of right answers alone), cut (the share cut off at the limit, of those of which it is
      known), failed (the share without a reply), right (the share of right answers).
    """
    replied = [one for one in answered if not one.reply.failed]
    known = [one for one in replied if one.reply.tokens is not None]
    ended = [one for one in replied if one.reply.finish]
    right = [one for one in known if mode in one.verdicts and one.verdicts[mode].credit >= 1]
    return {
        "right": means.fmean(one.verdicts[mode].credit if mode in one.verdicts else 0.0 for one in answered),
        "tokens": means.fmean(float(one.reply.tokens or 0) for one in known) if known else None,
        "tokens_right": means.fmean(float(one.reply.tokens or 0) for one in right) if right else None,
        "cut": sum(one.reply.finish == "length" for one in ended) / len(ended) if ended else None,
        "failed": (len(answered) - len(replied)) / len(answered),
    }


def notes(pair: Pair) -> list[str]:
    """What has to be known beside a pair's figures: rows that differ, conditions that differ."""
    said = []
    if any(pair.only):
        said.append(f"other row sets: {pair.only[0]:,} rows of A alone, {pair.only[1]:,} of B alone; left out")
    if pair.other_questions:
        said.append(f"{pair.other_questions:,} rows have another question or right answer; left out")
    rows = [100 * one["right"] for one in pair.lengths]
    for score, right in zip(pair.scores, rows, strict=True):
        if score is not None and abs(score - right) > 0.05:
            a, b = ("none" if one is None else f"{one:.1f}" for one in pair.scores)
            said.append(f"main number: {a} / {b}; it is no mean of rows, which are what is compared")
            break
    said += [f"{key}: {_short(a)} / {_short(b)}" for key, (a, b) in pair.conditions.items()]
    return said


def as_json(a: Folder, others: Mapping[str, tuple[Folder, Sequence[Pair]]], mode: str) -> dict[str, Any]:
    """What compare.json holds. `others`: letter -> (folder, its pairs with `a`)."""
    return {
        "mode": mode,
        "A": str(a.path),
        "test": "paired by question, clustered; p_holm over the benchmarks of a pair; detectable: 80 % power, 5 %",
        **{
            letter: {
                "path": str(folder.path),
                "benchmarks": {
                    pair.benchmark: {
                        "scores": list(pair.scores),
                        "right": pair.right._asdict(),
                        "p_holm": pair.p_holm,
                        "tokens": pair.tokens._asdict() if pair.tokens else None,
                        "lengths": [dict(one) for one in pair.lengths],
                        "only": list(pair.only),
                        "other_questions": pair.other_questions,
                        "conditions": {key: list(values) for key, values in pair.conditions.items()},
                    }
                    for pair in pairs
                },
                "missing": {
                    "A": [name for name in folder.answered if name not in a.answered],
                    letter: [name for name in a.answered if name not in folder.answered],
                },
            }
            for letter, (folder, pairs) in others.items()
        },
    }


def _same(left: Answered, right: Answered) -> bool:
    return (left.row.question, left.row.gold) == (right.row.question, right.row.gold)


def _credits(folder: Folder, answered: Sequence[Answered], mode: str) -> list[float]:
    missing = next((one for one in answered if mode not in one.verdicts), None)
    if missing:
        raise InputError(f"{folder.path}: row {missing.row.index} has no verdict in mode {mode}; evaluate again")
    return [one.verdicts[mode].credit for one in answered]


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [key for key in {**a, **b} if not any(part in THE_MODELS for part in key.split("."))]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def _short(value: Any) -> str:
    text = "not recorded" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
