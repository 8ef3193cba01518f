from __future__ import annotations

import pytest

from capcur_jax.evaluation import rules, scoring
from capcur_jax.evaluation.benchmarks import wording
from capcur_jax.evaluation.benchmarks.accuracy import accuracy
from capcur_jax.evaluation.benchmarks.base import NOTHING, Ask, Benchmark, Reply, Row, Verdict

OPTIONS = {"A": "red", "B": "blue"}
ROW = Row("1", "Which?", ("B",), options=OPTIONS)


def _extracting(row, text, extracted):
    return (
        Ask("extract")
        if extracted is None
        else Ask("equal", answer=extracted)
        if extracted != "B"
        else Verdict(1, "rule")
    )


def benchmark(official=rules.choice, kit=rules.choice) -> Benchmark:
    return Benchmark(
        name="x", title="X", files=("x.tsv",), where="here", sets={}, load=lambda source, images: [],
        put=wording.choices, official=official, kit=kit, metrics=accuracy(),
    )  # fmt: skip


class Scripted:
    """A judge that says the next word, and keeps what it was asked."""

    def __init__(self, *words):
        self.words, self.asked = list(words), []

    def decide_all(self, asks):
        self.asked.append([ask for _, _, ask in asks])
        return [self.words.pop(0) for _ in asks]


def one(reply, mode="kit", read="raw", judge=None, **rules_):
    reply = Reply(reply) if isinstance(reply, str) else reply
    found = scoring.score(benchmark(**rules_), [ROW], [reply], mode, read, judge)
    return found.verdicts[0], found


def test_what_rules_do_not_decide_is_undecided_and_wrong_without_a_judge():
    verdict, found = one("well, b or so")
    assert verdict == Verdict(0.0, "none") and found.numbers["undecided"] == 1 and found.shares["undecided"] == 1


def test_a_judge_is_asked_only_then():
    judge = Scripted("B")
    found = scoring.score(benchmark(), [ROW] * 3, [Reply("B"), Reply("dunno"), Reply("A")], "kit", judge=judge)
    assert [(v.credit, v.by) for v in found.verdicts] == [(1, "rule"), (1, "judge"), (0, "rule")]
    assert judge.asked == [[Ask("letter")]] and found.numbers["right"] == 2


@pytest.mark.parametrize("word, verdict", [
    ("B", Verdict(1.0, "judge", "B")), ("A", Verdict(0.0, "judge", "A")), (NOTHING, Verdict(0.0, "judge")),
    (None, Verdict(0.0, "none")),
])  # fmt: skip
def test_words_of_a_judge(word, verdict):
    assert one("dunno", judge=Scripted(word))[0] == verdict


def test_an_extraction_is_compared_by_the_rule_and_then_by_the_judge():
    judge = Scripted("beta", "same")
    assert one("text", judge=judge, kit=_extracting)[0] == Verdict(1.0, "judge", "beta")
    assert judge.asked == [[Ask("extract")], [Ask("equal", answer="beta")]]
    assert one("text", judge=Scripted("beta", "different"), kit=_extracting)[0].credit == 0
    assert one("text", judge=Scripted("B"), kit=_extracting)[0] == Verdict(1, "judge")
    assert one("text", judge=Scripted(NOTHING), kit=_extracting)[0] == Verdict(0.0, "judge")


def test_a_recorded_extraction_stands_in_for_a_judges():
    assert one(Reply("text", extracted="B"), kit=_extracting)[0] == Verdict(1, "judge")
    assert one(Reply("text", extracted="(B)"))[0] == Verdict(1.0, "judge", "B")
    assert one(Reply("B", extracted="A"))[0] == Verdict(1.0, "rule", "B")


def test_a_cut_thought_is_no_answer_but_for_the_official_scorer():
    verdict, found = one("<think>it is near A")
    assert verdict == Verdict(0.0, "rule") and found.shares["cut"] == 1
    assert one("<think>it is near B", "official")[0].credit == 1  # as the text came
    assert one("<think>it is near B", "official", "box")[0].credit == 0
    assert one("<think>it is red</think> B", read="box")[0] == Verdict(1.0, "rule", "B")


def test_a_failed_request_is_wrong_and_counted():
    verdict, found = one(Reply("B", failed="the request failed"))
    assert verdict.credit == 0 and found.shares["failed"] == 1 and found.numbers["undecided"] == 0


def test_what_stands_in_a_box_needs_no_extraction():
    judge = Scripted("different")
    assert one(r"thus \boxed{B}", read="box", kit=_extracting)[0] == Verdict(1, "rule")
    assert one(r"thus \boxed{beta}", read="box", judge=judge, kit=_extracting)[0].by == "judge"
    assert judge.asked == [[Ask("equal", answer="beta")]]


def test_no_rows_have_no_score():
    assert scoring.score(benchmark(), [], [], "kit").numbers == {"score": None, "right": 0, "rows": 0, "undecided": 0}


@pytest.mark.parametrize("mode, read", [("kit", "all"), ("both", "raw")])
def test_modes_and_readings_are_known(mode, read):
    with pytest.raises(ValueError, match="is one of"):
        scoring.score(benchmark(), [], [], mode, read)
