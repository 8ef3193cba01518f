"""Golds of rows: taken out of what they are wrapped in, or refused where no response could equal them."""

import decimal
import json
import random
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from capcur_jax.answers import kinds, letters
from capcur_jax.answers.kinds import gold_of
from capcur_jax.answers.size import too_large
from capcur_jax.curation.checking import unanswerable
from capcur_jax.data.problem import Drop, Problem
from capcur_jax.data.rows import Tally, read_problems, read_rows, write_rows
from capcur_jax.rewards.compare import decide
from tests.data.tables import table, written


def one(tmp_path, **row):
    (found,) = read_rows(written(tmp_path / "rows.jsonl", {"problem": "p"} | row))
    return found


def assert_as_told(found, wanted):
    if wanted.startswith("refused: "):
        assert isinstance(found, Drop) and found.reason == wanted.removeprefix("refused: "), found
        assert "; " in found.detail or "? " in found.detail
    else:
        accepted = tuple(text.strip("`") for text in wanted.split("`, `"))
        assert isinstance(found, Problem) and (found.answers or (found.answer,)) == accepted
        assert unanswerable(found) is None  # in a box, each is graded right


@pytest.mark.parametrize(("answer", "wanted"), table("`answer`"))
def test_the_table_of_golds(tmp_path, answer, wanted):
    file = written(tmp_path / "rows.jsonl", '{"problem": "p", "answer": ' + answer + "}")
    (found,) = read_rows(file)
    assert_as_told(found, wanted)
    if isinstance(found, Problem):  # what is written is read back, and nothing is left to repair
        write_rows(tmp_path / "again.jsonl", [found])
        (again,) = read_rows(tmp_path / "again.jsonl")
        assert again == found and not again.repaired


@pytest.mark.parametrize(("problem", "answer", "wanted"), table("`problem`"))
def test_the_table_of_choices(tmp_path, problem, answer, wanted):
    assert_as_told(one(tmp_path, problem=problem, answer=answer), wanted)
    if answer.isdecimal():
        assert_as_told(one(tmp_path, problem=problem, answer=int(answer)), wanted)


def test_a_declared_letter_may_be_given_by_its_text(tmp_path):
    question = "Which? A. cat B. dog C. dog"
    found = one(tmp_path, problem=question, answer="cat", answer_type="letter")
    assert (found.answer, found.answer_type) == ("A", "letter") and found.repaired
    for answer in ("dog", "cow"):
        assert one(tmp_path, problem=question, answer=answer, answer_type="letter").reason == "bad answer_type"


KEPT = [
    ("What is 2+3? Follow these rules:\n1. Think first\n2. Be brief", "5"),
    ("Which number is 2+3? Follow these rules:\n1. Think first\n2. Be brief", "5"),
    ("How many steps? 1. boil 2. cut 3. eat", "5"),
    ("A. <image>\nB. <image>", "B"),
    ("Train A: 5 km, train B: 7 km. What grade did the slower one get?", "C"),
    ("(a) Find x. (b) Find y.", "C"), ("(a) Find x.\n(b) Find y.", "C"),
    ("A segment has the vertices A. (0,0), B. (1,0). What is its middle called?", "M"),
]  # fmt: skip


@pytest.mark.parametrize(("problem", "answer"), KEPT)
def test_prose_steps_and_pictures_are_no_list_of_options(tmp_path, problem, answer):
    assert_as_told(one(tmp_path, problem=problem, answer=answer, images=["a.png"] * problem.count("<image>")), answer)


@pytest.mark.parametrize(("problem", "answer", "reason"), [
    ("Pick.\n(A) cat\n(B) dog", "C", "letter"), ("Pick. A. cat B. dog C. cow", "D", "letter"),
    ("选哪个？ A、猫 B、狗", "C", "letter"), ("Which, it or that?\n1) it\n2) that", "3", "number"),
    ("Pick one: ① cat ② dog", "③", "number"),
])  # fmt: skip
def test_no_option_can_be_meant(tmp_path, problem, answer, reason):
    assert_as_told(one(tmp_path, problem=problem, answer=answer), f"refused: {reason} not among the options")


def test_words_for_nothing_are_answers_where_the_row_says_so(tmp_path):
    assert one(tmp_path, answer="None", answer_type="word").answer == "None"
    assert one(tmp_path, problem="Which? A. null B. void", answer="null").answer == "null"
    assert one(tmp_path, answer="None").reason == "no answer"


def test_every_answer_counts_and_comes_back(tmp_path):
    rows = [
        {"id": "1", "problem": "p", "answers": ["Acme Foods", "Acme", "Acme Foods", 4]},
        {"id": "2", "problem": "p", "answer": "2", "answers": ["two", "2", None, ""]},
        {"id": "3", "problem": "p", "answers": ["4"]},
        {"id": "4", "problem": "p", "answers": []},
        {"id": "5", "problem": "p", "answers": "4"},
        {"id": "6", "problem": "p", "answer": ["4"], "answers": ["5"]},
        {"id": "7", "problem": "p", "answers": ["4", "{"]},
        {"id": "8", "problem": "p", "answers": ["4", ["5"]]},
        {"id": "9", "problem": "Which? A. x B. y", "answers": ["A", "B"]},
    ]
    problems, drops = read_problems(written(tmp_path / "rows.jsonl", *rows))
    assert {p.id: p.answers for p in problems} == {
        "1": ("Acme Foods", "Acme", "4"), "2": ("2", "two"), "3": (), "9": ("A", "B"),
    }  # fmt: skip
    assert [p.answer for p in problems] == ["Acme Foods", "2", "4", "A"]
    assert [drop.reason for drop in drops] == [
        "no answer", "bad answers", "bad answer", "answer can't be boxed", "bad answers",
    ]  # fmt: skip
    for name in ("out.jsonl", "out.parquet"):
        write_rows(tmp_path / name, problems)
        assert read_problems(tmp_path / name)[0] == problems
    with pytest.raises(ValueError, match="begin with `answer`"):
        Problem("1", "p", "4", answers=("5", "4"))


def test_options_are_looked_for_once_a_row_and_common_golds_are_not_taken_apart(tmp_path, monkeypatch):
    asked, normalized, look = [], [], letters._labels
    monkeypatch.setattr(letters, "_labels", lambda text: asked.append(text) or look(text))
    monkeypatch.setattr(kinds, "normalize", lambda text: normalized.append(text) or text)
    kinds.answer_type_of.cache_clear()
    rows = [{"problem": f"{i}? A. x B. y", "answers": [gold, gold * 2]} for i, gold in enumerate(("7", "12", "4"))]
    problems, drops = read_problems(written(tmp_path / "rows.jsonl", *rows))
    assert [problem.answer_type for problem in problems] == ["number"] * 3 and not drops
    assert len(asked) == 3 and not normalized


def test_columns_of_parquet_are_read_as_they_were_meant(tmp_path):
    columns = {
        "problem": pyarrow.array([b"q1", b"q2", b"\xff\xff"]),
        "single": pyarrow.array([3.3, 0.1, 1e-5], pyarrow.float32()),
        "decimal": pyarrow.array([decimal.Decimal("1.50"), decimal.Decimal("2.00"), None]),
        "half": pyarrow.array(np.array([0.1, 2, 3], np.float16)),
    }
    wanted = {"single": ["3.3", "0.1"], "decimal": ["1.50", "2.00"], "half": ["0.1", "2"]}
    for name, golds in wanted.items():
        table = pyarrow.table({"problem": columns["problem"], "answer": columns[name], "other": columns["single"]})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        *good, bad = read_rows(tmp_path / "rows.parquet")
        assert [row.answer for row in good] == golds and good[0].metadata == {"other": 3.3}
        assert bad.reason == "bad problem" and "row 3" in bad.where


def test_repairs_are_counted(tmp_path):
    rows = [{"problem": "5 \times 2?", "answer": "\\boxed{10}"}, {"problem": "q", "answer": "4"}, {"problem": "r"}]
    tally = Tally()
    first, _ = tally.kept(read_rows(written(tmp_path / "rows.jsonl", *rows)))
    assert first.problem == "5 \\times 2?" and first.answer == "10"
    assert tally.summary() == {
        "rows": 3, "kept": 2, "dropped": {"no answer": 1},
        "repaired": {"lost backslash put back": 1, "answer taken out of its wrapping": 1},
    }  # fmt: skip


PIECES = r"""A B cat 5 3.50 1e-05 \frac{1}{2} \boxed{ } { <answer> </answer> #### Answer: 答案： [ ] ' " , - $ \$ % None
nan or and cm ° \text{ ( ) x = \pi ^2 ² ½ ① / 1990-05-12 : \ \left \right | < > \le 1,000 5米 ; 。 … “ é ٣ _ & # ~ `
*"""
QUESTIONS = ("p", "Which? A. cat B. dog", "Which?\n(A) cat\n(B) dog\n(C) 5", "Which? 1) cat 2) dog", "What time?",
             "Select all that apply. A. x B. y C. z", "What is the ratio?")  # fmt: skip


def test_of_two_thousand_odd_golds_each_is_refused_or_graded_right_in_a_box(tmp_path):
    draw = random.Random(0)
    rows = []
    for _ in range(2000):
        pieces = draw.choices([*PIECES.split(), " ", "\n", "\t"], k=draw.choice((1, 1, 2, 2, 3, 4, 6, 10)))
        rows.append({"problem": draw.choice(QUESTIONS), "answer": "".join(pieces)})
    problems, drops = read_problems(written(tmp_path / "rows.jsonl", *rows))
    assert len(problems) > 800 and len(drops) > 200
    assert not [(problem.answer, why) for problem in problems if (why := unanswerable(problem))]
    write_rows(tmp_path / "again.jsonl", problems)
    assert read_problems(tmp_path / "again.jsonl") == (problems, [])


@pytest.mark.parametrize(
    "words", ["Options vary", "answer", "The answer", "[A, B]", "f: x -> 2", "'A'", "A####", "1\t2"]
)
def test_what_only_looks_wrapped_stays_or_is_refused(tmp_path, words):
    found = one(tmp_path, answer=words)
    assert isinstance(found, Drop) or found.answer == words, json.dumps(words)


@pytest.mark.parametrize("answer", [
    "9^{9^{9^9}}", "9^9^9^9", "10^{1000000000}", "10**1000000", "x^{-1000000}", r"2^{10 \times 10^6}", "1000000000!",
    "(10^9)!", "(9!)!", "(" * 500, "(" * 41 + "1 + x" + ")" * 41, "x = 2^{1000000}",
    "9^" * 200 + "9",
])  # fmt: skip
def test_a_gold_that_cannot_be_evaluated_costs_its_row(tmp_path, answer):
    found = one(tmp_path, answer=answer)
    assert isinstance(found, Drop) and found.reason == "answer can't be graded" and "write it otherwise" in found.detail
    assert unanswerable(Problem("a", "p", answer)).reason == found.reason
    assert one(tmp_path, answers=["A", answer], answer_type="letter").reason == found.reason


@pytest.mark.parametrize("answer", [
    "2^{100000}", "100000!", "10^{1000}", "x^{n!}", "e^{x/1000000}", r"2^{\frac{1}{1000000}}", "2^{3^4}", "x^{x^{x}}",
    "f(1000000)", "3^{x+1000000}", "(" * 20 + "x" + ")" * 20, "2^{2^{2^2}}", "(1)!" * 100, "x^" * 200 + "x",
])  # fmt: skip
def test_large_is_what_is_large_for_certain(tmp_path, answer):
    start = time.perf_counter()
    assert too_large(answer) == "" and time.perf_counter() - start < 1
    assert isinstance(one(tmp_path, answer=answer), Problem)


def test_a_word_may_hold_what_looks_large(tmp_path):
    assert isinstance(one(tmp_path, answer="We sold 2000000!", answer_type="word"), Problem)


@pytest.mark.parametrize("more", [{}, {"answer_type": "letter"}])
@pytest.mark.parametrize("question", ["p", "How many? A. 4 apples B. 5 pears"])
def test_answers_of_several_types_are_accepted_and_read_back(tmp_path, question, more):
    """The type of a row is that of its first answer."""
    found = one(tmp_path, problem=question, answers=["A", "4"], **more)
    assert isinstance(found, Problem) and found.answers == ("A", "4") and found.answer_type == "letter"
    assert unanswerable(found) is None and decide("4", gold_of("A", found.answers, "letter", question)) is True
    write_rows(tmp_path / "again.jsonl", [found])
    assert list(read_rows(tmp_path / "again.jsonl")) == [found]
    assert one(tmp_path, problem="p", answers=["4", "A"], answer_type="letter").reason == "bad answer_type"
