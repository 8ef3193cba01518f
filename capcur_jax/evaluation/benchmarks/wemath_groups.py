"""WeMath's numbers: what a group of steps and composite shows of knowledge and of generalization."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from capcur_jax.data.problem import BadRow
from capcur_jax.evaluation.benchmarks.base import Row, Verdict
from capcur_jax.evaluation.benchmarks.measures import by_class, percent

_ROLE = re.compile(r"([23])steps_(1|2|3|multi)")


def role(key: str) -> tuple[int, str]:
    """(steps of the group, which step the row is: "1", "2", "3" or "multi"). Raises BadRow."""
    match = _ROLE.fullmatch(key)
    if not match or match[2] == "3" > match[1]:
        raise BadRow("bad key", f"`key` {key!r} is no role such as 2steps_1 or 3steps_multi; download the file again")
    return int(match[1]), match[2]


def metrics(rows: Sequence[Row], verdicts: Sequence[Verdict], mode: str) -> dict[str, Any]:
    """Score (strict) and loose, S1 to S3 in per cent; the four classes as counts of groups; rates in per cent.

    IG: all steps right, the composite wrong. IK: a step and the composite wrong. CM: the composite right and all steps
    (strict), or any (loose). RM: the composite right without. A group that lacks a row is in no class; it is counted.
    """
    groups: dict[str, dict[str, bool]] = defaultdict(dict)
    needed: dict[str, int] = {}
    shares: dict[str, list[float]] = {"S1": [], "S2": [], "S3": []}
    steps: list[tuple[Row, Verdict]] = []
    for row, verdict in zip(rows, verdicts, strict=True):
        count, part = role(row.facts["key"])
        groups[row.facts["ID"]][part], needed[row.facts["ID"]] = verdict.credit == 1, count + 1
        shares[f"S{count}" if part == "multi" else "S1"].append(verdict.credit)
        if part != "multi":
            steps.append((row, verdict))
    whole = [parts for name, parts in groups.items() if len(parts) == needed[name]]
    classes = _classes(whole)
    score = {how: _share(classes[f"CM_{how}"] + classes["IG"] / 2, len(whole)) for how in ("strict", "loose")}
    return {
        "score": score["strict"], **score, **{name: percent(credits) for name, credits in shares.items()}, **classes,
        "groups": len(whole), "partial_groups": len(groups) - len(whole), "rates": _rates(classes, len(whole)),
        "concepts": by_class(*map(list, zip(*steps, strict=True)), "concept") if steps else {},
    }  # fmt: skip


def _classes(whole: Sequence[dict[str, bool]]) -> dict[str, int]:
    count = Counter({name: 0 for name in ("IG", "IK", "CM_strict", "CM_loose", "RM_strict", "RM_loose")})
    for parts in whole:
        right = [value for part, value in parts.items() if part != "multi"]
        if parts["multi"]:
            count["CM_strict" if all(right) else "RM_strict"] += 1
            count["CM_loose" if any(right) else "RM_loose"] += 1
        else:
            count["IG" if all(right) else "IK"] += 1
    return dict(count)


def _rates(classes: dict[str, int], groups: int) -> dict[str, float]:
    """Shares of all groups; of RM of the groups whose composite is right."""
    found = {name: _share(count, groups) for name, count in classes.items() if name[:2] != "RM"}
    for how in ("strict", "loose"):
        right = classes[f"RM_{how}"] + classes[f"CM_{how}"]
        found[f"RM_{how}"] = _share(classes[f"RM_{how}"], right)
    return found


def _share(part: float, of: int) -> float:
    """In per cent; of nothing it is 0."""
    return 100 * part / of if of else 0.0
