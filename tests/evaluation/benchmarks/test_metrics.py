"""All metrics against second ones that are written plainly, from what the sets' authors say, on random verdicts."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capcur_jax.evaluation.benchmarks import capability, registry
from capcur_jax.evaluation.benchmarks.base import MODES, Row, Verdict

Pairs = list[tuple[Row, float]]


def mean(credits: list[float]) -> float:
    total = 0.0
    for one in credits:
        total += one
    return 100 * total / len(credits) if credits else math.nan


def of(pairs: Pairs, fact: str, value: Any) -> list[float]:
    return [credit for row, credit in pairs if row.facts[fact] == value]


def values(pairs: Pairs, fact: str) -> set:
    return {row.facts[fact] for row, _ in pairs}


def classes(pairs: Pairs, fact: str) -> dict[str, float]:
    return {str(value): mean(of(pairs, fact, value)) for value in values(pairs, fact)}


def plain(**facts: str) -> Callable[[Pairs, str], dict]:
    """Of sets whose score is the share of right rows."""

    def expected(pairs: Pairs, mode: str) -> dict:
        found: dict[str, Any] = {"score": mean([credit for _, credit in pairs])}
        for name, fact in facts.items():
            found[name] = classes([pair for pair in pairs if pair[0].facts[fact] != ""], fact)
        return found

    return expected


def mathvista(pairs: Pairs, mode: str) -> dict:
    found = plain(tasks="task", types="type", sources="source")(pairs, mode)
    skills = {skill for row, _ in pairs for skill in row.facts["skills"]}
    found["skills"] = {
        skill: mean([credit for row, credit in pairs if skill in row.facts["skills"]]) for skill in skills
    }
    return found


def wemath(pairs: Pairs, mode: str) -> dict:
    found: dict[str, Any] = collections.Counter()
    groups = 0
    for name in values(pairs, "ID"):
        rows = {row.facts["key"]: credit for row, credit in pairs if row.facts["ID"] == name}
        steps = 2 if name.startswith("2") else 3
        needed = [f"{steps}steps_{part}" for part in (*range(1, steps + 1), "multi")]
        if sorted(rows) != sorted(needed):
            continue
        groups += 1
        every, some = all(rows[key] for key in needed[:-1]), any(rows[key] for key in needed[:-1])
        composite = rows[needed[-1]]
        found["IG"] += bool(every and not composite)
        found["IK"] += bool(not every and not composite)
        found["CM_strict"] += bool(every and composite)
        found["CM_loose"] += bool(some and composite)
        found["RM_strict"] += bool(not every and composite)
        found["RM_loose"] += bool(not some and composite)
    scores = {
        how: 100 * (groups - 0.5 * found["IG"] - found[f"RM_{how}"] - found["IK"]) / groups if groups else 0.0
        for how in ("strict", "loose")
    }
    found = {name: found[name] for name in ("IG", "IK", "CM_strict", "CM_loose", "RM_strict", "RM_loose")} | scores
    found["score"] = scores["strict"]
    found["S1"] = mean([credit for row, credit in pairs if "multi" not in row.facts["key"]])
    for steps in (2, 3):
        found[f"S{steps}"] = mean(of(pairs, "key", f"{steps}steps_multi"))
    return found | {"groups": groups}


def pope(rows: list[Row], said: list[str | None]) -> dict:
    def numbers(split: str | None) -> dict:
        seen = [
            (row.gold[0], word)
            for row, word in zip(rows, said, strict=True)
            for name in row.facts["splits"]
            if split in (None, name)
        ]
        right_yes = sum(gold == "Yes" and word == "Yes" for gold, word in seen)
        wrong_yes = sum(gold == "No" and word == "Yes" for gold, word in seen)
        missed = sum(gold == "Yes" and word != "Yes" for gold, word in seen)
        precision = right_yes / (right_yes + wrong_yes) if right_yes + wrong_yes else 0.0
        recall = right_yes / (right_yes + missed) if right_yes + missed else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        right = mean([float(gold == word) for gold, word in seen])
        share = 100 * (right_yes + wrong_yes) / len(seen)
        return {
            "f1": 100 * f1,
            "accuracy": right,
            "precision": 100 * precision,
            "recall": 100 * recall,
            "yes_share": share,
        }

    found = numbers(None)
    splits = {name for row in rows for name in row.facts["splits"]}
    return found | {"score": found["f1"]} | {split: numbers(split) for split in splits}


def dynamath(pairs: Pairs, mode: str) -> dict:
    seeds = values(pairs, "seed")
    worst = [float(all(credit == 1 for credit in of(pairs, "seed", seed))) for seed in seeds]
    average = mean([credit for _, credit in pairs])
    found = {"score": average, "average": average, "worst_case": mean(worst)}
    return found | {"subjects": classes(pairs, "subject"), "levels": classes(pairs, "level")}


def hallusionbench(pairs: Pairs, mode: str) -> dict:
    """As in the authors' utils: a row without a picture is in no figure, but in its question."""
    if mode == "kit":
        pairs = [(row, credit) for row, credit in pairs if row.facts["seen"]]
    figures: dict[tuple, list[float]] = collections.defaultdict(list)
    questions: dict[tuple, list[float]] = collections.defaultdict(list)
    for row, credit in pairs:
        fact = row.facts
        if (fact["category"], fact["figure"]) != ("VS", "0"):
            figures[fact["category"], fact["subcategory"], fact["set"], fact["figure"]].append(credit)
        questions[fact["category"], fact["subcategory"], fact["set"], fact["question"]].append(credit)
    found = {"aAcc": mean([credit for _, credit in pairs])}
    for name, groups in (("fAcc", figures), ("qAcc", questions)):
        found[name] = mean([float(sum(credits) == len(credits)) for credits in groups.values()])
    return found | {"score": (found["aAcc"] + found["fAcc"] + found["qAcc"]) / 3}


def blink(pairs: Pairs, mode: str) -> dict:
    tasks = classes(pairs, "task")
    rows = mean([credit for _, credit in pairs])
    return {"score": rows if mode == "kit" else sum(tasks.values()) / len(tasks), "tasks": tasks}


def visonlyqa(pairs: Pairs, mode: str) -> dict:
    kept = [(row, credit) for row, credit in pairs if mode == "official" or not row.facts["several"]]
    return plain(splits="split", categories="category")(kept, mode) | {"left_out": len(pairs) - len(kept)}


def cvbench(pairs: Pairs, mode: str) -> dict:
    sources = classes(pairs, "source")
    return {"score": sum(sources.values()) / len(sources), **sources, "tasks": classes(pairs, "task")}


def chartqa(pairs: Pairs, mode: str) -> dict:
    splits = classes(pairs, "split")
    rows = mean([credit for _, credit in pairs])
    return {"score": rows if mode == "kit" else sum(splits.values()) / len(splits), **splits}


def facts_of(name: str, random: Random) -> list[dict[str, Any]]:
    """The facts of a random number of rows of a benchmark."""
    pick = random.choice
    count = random.randint(1, 24)
    if name == "wemath":
        keys = [
            {"ID": f"{steps}steps_{number}", "key": f"{steps}steps_{part}", "concept": pick("xy")}
            for steps in (2, 3) for number in range(random.randint(0, 4)) for part in (*range(1, steps + 1), "multi")
        ]  # fmt: skip
        return random.sample(keys, random.randint(max(0, len(keys) - 3), len(keys)))
    if name == "hallusionbench":
        places = itertools.product(("VD_ocr", "VS_ocr", "VS_map"), "01", "012", "01")
        rows = []
        for subcategory, number, figure, question in random.sample(list(places), count):
            category = subcategory[:2]
            seen = (category, figure) != ("VS", "0")
            rows.append({"category": category, "subcategory": subcategory, "set": number, "figure": figure,
                         "question": question, "seen": seen})  # fmt: skip
        return rows
    if name == "mathvista":
        keys = "task", "type", "source"
        skills = [["logic"], ["logic", "algebra"], []]
        return [{key: pick("xy") for key in keys} | {"skills": pick(skills)} for _ in range(count)]
    if name == "visonlyqa":
        return [
            {"split": pick(["Eval_Real", "Eval_Synthetic"]), "category": pick("xy"), "several": pick([True, False])}
            for _ in range(count)
        ]
    named = {
        "mathvision": ("subject", "level"), "realworldqa": ("category",), "mmstar": ("category", "l2_category"),
        "dynamath": ("seed", "subject", "level"), "blink": ("task",), "cvbench_2d": ("source", "task"),
        "vstar": ("category",), "chartqa": ("split",), **{one: ("kind", "source") for one in capability.NAMES},
        **{f"mathverse_vision_{one}": ("version", "subject", "subfield", "type") for one in ("only", "intensive")},
    }  # fmt: skip
    return [{key: pick("xyz") for key in named.get(name, ())} for _ in range(count)]


VERSIONS = plain(versions="version", subjects="subject", subfields="subfield", types="type")
EXPECTED: dict[str, Callable[[Pairs, str], dict]] = {
    "mathvista": mathvista, "mathvision": plain(subjects="subject", levels="level"),
    "mathverse_vision_intensive": VERSIONS, "mathverse_vision_only": VERSIONS, "wemath": wemath, "aokvqa": plain(),
    "realworldqa": plain(categories="category"), "mmstar": plain(categories="category", l2_categories="l2_category"),
    "dynamath": dynamath, "hallusionbench": hallusionbench, "blink": blink, "visonlyqa": visonlyqa,
    "cvbench_2d": cvbench, "vstar": plain(categories="category"), "chartqa": chartqa, "textvqa": plain(),
    **{name: plain(kinds="kind", sources="source") for name in capability.NAMES},
}  # fmt: skip


def same(found: Any, expected: Any, where: str) -> None:
    """Every number that is expected is there, and no class besides."""
    if isinstance(expected, dict):
        assert set(expected) <= set(found), (where, expected, found)
        for key, value in expected.items():
            same(found[key], value, f"{where}.{key}")
            if isinstance(value, dict) and key not in ("random", "popular", "adversarial"):
                assert set(found[key]) == set(value), (where, key)
    else:
        assert found == pytest.approx(expected, abs=1e-9, nan_ok=True), where


def test_every_benchmark_has_a_second_implementation():
    assert set(EXPECTED) | {"pope"} == set(registry.benchmarks())


@pytest.mark.parametrize("name", EXPECTED)
@given(random=st.randoms(use_true_random=False))
def test_metrics(name, random):
    facts = facts_of(name, random)
    soft = name == "textvqa"
    pairs = [
        (Row(str(number), "?", ("A",), facts=one), random.random() if soft else float(random.random() < 0.6))
        for number, one in enumerate(facts)
    ]
    rows = [row for row, _ in pairs]
    verdicts = [Verdict(credit, random.choice(["rule", "judge", "none"])) for _, credit in pairs]
    for mode in MODES:
        found = registry.get(name).metrics(rows, verdicts, mode)
        same(found, EXPECTED[name](pairs, mode), f"{name}, {mode}")


@given(random=st.randoms(use_true_random=False))
def test_pope(random):
    splits = [("random",), ("popular", "adversarial"), ("random", "popular", "adversarial")]
    rows = [
        Row(str(number), "?", (random.choice(["Yes", "No"]),), facts={"splits": random.choice(splits)})
        for number in range(random.randint(1, 24))
    ]
    said = [random.choice(["Yes", "No", None]) for _ in rows]
    verdicts = [Verdict(float(word == row.gold[0]), "rule", word) for row, word in zip(rows, said, strict=True)]
    for mode in MODES:
        same(registry.get("pope").metrics(rows, verdicts, mode), pope(rows, said), mode)


@settings(max_examples=10)
@given(random=st.randoms(use_true_random=False))
def test_the_order_of_rows_plays_no_part(random):
    for name in EXPECTED:
        facts = facts_of(name, random)
        pairs = [
            (Row(str(number), "?", ("A",), facts=one), Verdict(float(random.random() < 0.5), "rule"))
            for number, one in enumerate(facts)
        ]
        mixed = random.sample(pairs, len(pairs))
        first, second = (
            registry.get(name).metrics([row for row, _ in some], [one for _, one in some], "official")
            for some in (pairs, mixed)
        )
        same(first, second, name)
