"""The paper's benchmarks: both published formats, their rules, and the traps that are known of each."""

from __future__ import annotations

import json

import pytest

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks import registry
from capcur_jax.evaluation.benchmarks.base import MODES, Ask, Reply, Row, Verdict
from capcur_jax.evaluation.benchmarks.mathvision_answer import equal, final_answer
from capcur_jax.evaluation.scoring import score
from tests.evaluation.published import base64_of, choices, lines, png, table


def benchmark(name):
    return registry.get(name)


def decided(name, row, text, mode, extracted=None):
    """The credit of a reply, or what a judge would be asked."""
    found = getattr(benchmark(name), mode)(row, text, extracted)
    return found.credit if isinstance(found, Verdict) else found.kind


def numbers(name, rows, texts, mode):
    return score(benchmark(name), rows, [Reply(text) for text in texts], mode).numbers


@pytest.mark.parametrize("name", registry.ORDER[:9])
def test_benchmarks_are_known_by_name(name):
    found = benchmark(name)
    assert found.name == name and found.files and found.where and found.sets
    with pytest.raises(InputError, match=rf"no benchmark 'x'; choose from .*{name}"):
        benchmark("x")


def test_modules_are_small():
    from capcur_jax.evaluation import benchmarks

    for name in ("mathvista", "mathvision", "mathverse", "wemath", "aokvqa", "realworldqa", "mmstar", "pope"):
        (folder,) = benchmarks.__path__
        with open(f"{folder}/{name}.py") as file:
            assert len(file.readlines()) <= 80, name


# ---------------------------------------------------------------------- MathVista

FREE = {"choices": None, "unit": None, "precision": None, "question_type": "free_form", "answer_type": "integer"}
META = {"split": "testmini", "task": "math word problem", "skills": ["arithmetic reasoning", "logical reasoning"]}


@pytest.fixture
def mathvista(tmp_path):
    rows = {
        "1": FREE | {"question": "How many?", "answer": "7"},
        "2": FREE | {"question": "How long?", "answer": "1.2", "answer_type": "float", "precision": 1, "unit": "m"},
        "3": FREE | {"question": "Which?", "answer": "145°", "answer_type": "text", "question_type": "multi_choice",
                     "choices": ["135°", "145°", "145°", "No"]},
        "4": FREE | {"question": "Which years?", "answer": "[2007, 2008]", "answer_type": "list"},
    }  # fmt: skip
    (tmp_path / "images").mkdir()
    for pid, row in rows.items():
        row |= {"pid": pid, "image": f"images/{pid}.jpg", "metadata": META}
        (tmp_path / "images" / f"{pid}.jpg").write_bytes(png(int(pid)))
    (tmp_path / "testmini.json").write_text(json.dumps(rows, indent=1))
    return tmp_path


def test_mathvista_is_read_from_its_own_file(mathvista):
    rows = benchmark("mathvista").load(mathvista, mathvista / "unpacked")
    assert [row.index for row in rows] == ["1", "2", "3", "4"] and rows[1].images[0].read_bytes() == png(2)
    asked = [benchmark("mathvista").put(row) for row in rows]
    assert "whole number" in asked[0] and "one decimal place" in asked[1] and "(Unit: m)" in asked[1]
    assert "(B) 145°" in asked[2] and "letter" in asked[2] and not any("7" in text for text in asked[:1])


def test_mathvistas_table_holds_the_official_query_and_literals(tmp_path):
    cells = choices(
        5,
        question="Hint: ...\nQuestion: Which?\nChoices:\n(A) x\n(B) None",
        choices="['x', 'None']",
        answer="None",
        answer_option="B",
        question_type="multi_choice",
        answer_type="text",
        task="t",
        skills="['a', 'b']",
    )
    del cells["A"], cells["B"]
    (row,) = benchmark("mathvista").load(table(tmp_path / "a.tsv", [cells]), None)
    assert row.options == {"A": "x", "B": "None"} and row.gold == ("B",) and row.facts["skills"] == ["a", "b"]
    assert benchmark("mathvista").put(row) == cells["question"]


@pytest.mark.parametrize("pid, extracted, official, kit", [
    ("1", "7", 1, 1), ("1", "7.0", 1, 0), ("1", "7.9", 1, 0), ("1", "seven", 0, 0), ("1", "inf", 0, 0),
    ("1", "9**9**9", 0, 0),
    ("2", "1.2", 1, 1), ("2", "1.24", 1, 0), ("2", "1.20", 1, 1), ("2", "1.26", 0, 0), ("2", "1.2 m", 0, 0),
    ("3", "(C) 145°", 1, 0), ("3", "B", 1, 1), ("3", "145", 1, 0), ("3", "135 deg", 0, 0), ("3", "No", 0, 0),
    ("3", "I do not know", 0, 0), ("4", "[2007, 2008]", 1, 0), ("4", "2007, 2008", 0, 0),
])  # fmt: skip
def test_mathvistas_scorers_start_from_an_extraction(mathvista, pid, extracted, official, kit):
    row = {row.index: row for row in benchmark("mathvista").load(mathvista, None)}[pid]
    found = [decided("mathvista", row, "some long reply", mode, extracted) for mode in MODES]
    assert found == [official, kit]


def test_mathvista_reads_bare_answers_without_a_judge(mathvista):
    rows = benchmark("mathvista").load(mathvista, None)
    cases = [(0, "7", 1, 1), (0, "It is 7.", "extract", "extract"), (1, "1.2", 1, 1), (1, "1.24", 1, "extract"),
             (2, "145°", 1, "extract"), (2, "(B)", "extract", 1), (3, "x", "extract", 0)]  # fmt: skip
    for at, text, official, kit in cases:
        assert [decided("mathvista", rows[at], text, mode) for mode in MODES] == [official, kit], text


def test_mathvista_counts_a_row_in_each_skill(mathvista):
    rows = benchmark("mathvista").load(mathvista, None)
    found = numbers("mathvista", rows, ["7", "1.2", "?", "?"], "official")
    assert found["score"] == 50 and found["skills"] == {"arithmetic reasoning": 50, "logical reasoning": 50}
    assert found["tasks"] == {"math word problem": 50} and found["undecided"] == 2


# ---------------------------------------------------------------------- MathVision

OWN = {"options": [], "solution": None, "level": 1, "subject": "counting", "image": "images/4.jpg"}


def mathvision(tmp_path, *rows):
    own = [OWN | {"id": str(number), "question": "How many?\n<image1>"} | row for number, row in enumerate(rows)]
    return benchmark("mathvision").load(lines(tmp_path / "testmini.jsonl", own), None)


@pytest.mark.parametrize("reply, official, kit", [
    ("B", 1, 1), ("so (B).", 1, 1), (r"\boxed{B}", 1, 1), (r"\boxed{\frac{1}{2}}", 1, "extract"),
    ("The answer is 0.5", 1, 0),
    (r"first \boxed{A}, then \boxed{B}", 1, 0), ("b", 1, "extract"), ("A", 0, 0), ("", 0, "extract"), ("C", 0, 0),
    (r"\boxed{\text{(B)}}", 1, 1),
])  # fmt: skip
def test_mathvision_with_options(tmp_path, reply, official, kit):
    (row,) = mathvision(tmp_path, {"options": ["3", "$\\frac{1}{2}$", "5"], "answer": "B"})
    assert [decided("mathvision", row, reply, mode) for mode in MODES] == [official, kit]


@pytest.mark.parametrize("gold, reply, official, kit", [
    ("6", "6", 1, 1), ("6", "The answer is 6.", 1, "extract"), ("6", r"so \boxed{6} apples", 1, 1),
    ("6", "6.001", 1, "extract"),
    ("6", "6.0000001", 1, 1), ("0.33", r"\boxed{\frac{1}{3}}", 1, "extract"), ("3\\pi", "9.42", 1, "extract"),
    ("12", "12 cm", 0, "extract"),
    ("12", r"\boxed{12^\circ}", 1, "extract"), ("(1,2)", r"\boxed{(1.0, 2.0)}", 1, "extract"),
    ("6", "9**9**9", 0, "extract"),
    ("6", r"\boxed{9^{9^{9^9}}}", 0, "extract"), ("6", "it is 6", 1, "extract"), ("2:1", "2:1", 1, 1),
])  # fmt: skip
def test_mathvision_without_options(tmp_path, gold, reply, official, kit):
    (row,) = mathvision(tmp_path, {"answer": gold})
    assert [decided("mathvision", row, reply, mode) for mode in MODES] == [official, kit]
    if kit == "extract":
        assert (
            decided("mathvision", row, reply, "kit", gold) == 1 and decided("mathvision", row, reply, "kit", "5") == 0
        )


def test_options_that_are_letters_are_labels_in_the_picture(tmp_path):
    (row,) = mathvision(tmp_path, {"options": list("ABCDE"), "answer": "D"})
    assert [decided("mathvision", row, "D", mode) for mode in MODES] == [1, 1]
    assert "(D) D" in benchmark("mathvision").put(row)


def test_mini_is_told_from_the_whole():
    sets = benchmark("mathvision").sets
    assert "mini" in sets[304] and "mini" not in sets[3040] and "mini" in benchmark("mathvista").sets[1000]


@pytest.mark.parametrize("reply, answer", [
    ("The answer is 5\nBecause ...", "5"), (r"\boxed{a} \boxed{\sqrt3}", r"\sqrt{3}"),
    (r"$x = 3/4$ so \boxed{x=3/4}", r"\frac{3}{4}"),
    ("0.5", r"\frac{1}{2}"), ("B\nbecause of A", "b"), (r"\boxed{\text{(E)}}", "e"), ("\\boxed{12", "\\boxed{12"),
    ("The value is 12.", "12"),
])  # fmt: skip
def test_final_answers(reply, answer):
    assert final_answer(reply) == answer


def test_equality_to_two_decimals():
    assert equal("0.333", r"\frac{1}{3}") and equal("(1/2,3)", "(0.5,3)") and equal("X + 1", "x + 1")
    assert not equal("", "") and not equal("x", "y") and not equal("0.34", "0.33") and not equal("(1,2)", "(1,3)")


@pytest.mark.parametrize("reply, right", [
    # Its parser stops where these go on, and has read five: checked with latex2sympy2 1.9.1.
    ("**The answer is 5.**", 1), ("The answer is 5.</answer>", 1), ("The answer is (5).", 1), (r"\boxed{5...}", 1),
    (r"\boxed{\{5\}}", 1), (r"\boxed{5'}", 1), (r"\boxed{5_2}", 1), (r"\boxed{5. apples}", 1), (r"\boxed{10/2.cm}", 1),
    # Here it does not.
    ("The answer is **5**", 0), ("The answer is 5</answer>", 0), (r"\boxed{5cm}", 0), (r"\boxed{(5.)}", 0),
    (r"\boxed{5.5.}", 0), (r"\boxed{_5}", 0),
])  # fmt: skip
def test_where_mathvisions_parser_stops(tmp_path, reply, right):
    (row,) = mathvision(tmp_path, {"answer": "5"})
    assert decided("mathvision", row, reply, "official") == right


# ---------------------------------------------------------------------- MathVerse


def test_mathverse_needs_a_judge_but_for_equal_texts(tmp_path):
    own = [
        {"sample_index": str(number), "problem_index": "1", "problem_version": version,
        "question": "" if "Only" in version else "Q",
         "image": "a.png", "answer": "B", "question_type": "multi-choice", "query_wo": "Answer.", "query_cot": "Think.",
         "question_for_eval": "Find x.", "metadata": {"subject": "Plane Geometry", "subfield": "Angle"}}
        for number, version in enumerate(["Text Lite", "Vision Intensive", "Vision Only"], start=1)
    ]  # fmt: skip
    (tmp_path / "testmini.json").write_text(json.dumps(own))
    rows = benchmark("mathverse_vision_only").load(tmp_path, None)
    assert [row.index for row in rows] == ["3"] and rows.left_out == {"of another version": 2}
    rule, row = benchmark("mathverse_vision_only").official, rows[0]
    assert rule(row, " B ", None).credit == 1 and benchmark("mathverse_vision_only").put(row) == "Answer."
    assert rule(row, "It is B", None) == Ask("extract", question="Find x.")  # not the empty question
    assert rule(row, "It is B", "B: 5") == Ask("equal", answer="B: 5", question="Find x.")
    assert rule(row, "It is B", " B").credit == 1
    cells = {"index": 9, "image": base64_of(1), "question": "Answer.", "answer": "B",
    "problem_version": "Vision Intensive",
             "metadata": "{'subject': 'Plane Geometry', 'source': None}"}  # fmt: skip
    (row,) = benchmark("mathverse_vision_intensive").load(table(tmp_path / "a.tsv", [cells]), None)
    assert row.facts["subject"] == "Plane Geometry"


# ---------------------------------------------------------------------- WeMath

ROLES = ("2steps_1", "2steps_2", "2steps_multi")


def wemath_rows(groups, roles=ROLES):
    return [
        Row(f"{group}{key}", "q", ("A",), options={"A": "1", "B": "2"}, facts={"ID": f"2steps_{group}", "key": key,
        "concept": "c"})
        for group in range(groups) for key in roles
    ]  # fmt: skip


def test_wemaths_own_file_has_options_in_one_text(tmp_path):
    own = {"ID": "2steps_7", "key": "2steps_multi", "question": "q", "answer": "D", "image_path": "a.png",
    "knowledge concept": "c",
           "option": "A. 3;4 cm;  B. B; C. C. 5;D. None; E. No correct answer"}  # fmt: skip
    (tmp_path / "testmini.json").write_text(json.dumps([own, own | {"key": "2steps_1"}]))
    rows = benchmark("wemath").load(tmp_path, None)
    assert rows[0].options == {"A": "3;4 cm", "B": "B", "C": "C. 5", "D": "None", "E": "No correct answer"}
    assert [(row.index, row.cluster) for row in rows] == [("0", "2steps_7"), ("1", "2steps_7")]
    asked = benchmark("wemath").put(rows[0])
    assert asked.endswith("E. No correct answer") and "D. None" in asked
    (tmp_path / "testmini.json").write_text(json.dumps([own | {"key": "2steps_7"}]))
    with pytest.raises(InputError, match="role"):
        benchmark("wemath").load(tmp_path, None)


@pytest.mark.parametrize("reply, official, kit", [
    ("A", 1, 1), ("Answer: A", 1, 1), ("Answer: B. No. Answer: <<A>>.", 1, 0), (r"\boxed{A}", 0, 1),
    ("<A>", 1, "letter"),
    ("Answer: a", 0, "letter"), ("", 0, "letter"), ("A cat is a long story, so Answer: B", 0, "letter"),
])  # fmt: skip
def test_wemaths_letters(reply, official, kit):
    row = wemath_rows(1)[0]
    assert [decided("wemath", row, reply, mode) for mode in MODES] == [official, kit]


def test_wemaths_classes():
    # steps, composite: mastered, not generalized, by rote, one step right and composite right, nothing right
    replies = "AAAAABBBAABAABB"
    found = numbers("wemath", wemath_rows(5), replies, "official")
    assert {name: found[name] for name in ("IG", "IK", "CM_strict", "CM_loose", "RM_strict", "RM_loose")} == {
        "IG": 1, "IK": 1, "CM_strict": 1, "CM_loose": 2, "RM_strict": 2, "RM_loose": 1,
    }  # fmt: skip
    n = 5
    assert found["strict"] == found["score"] == pytest.approx(100 * (n - 0.5 * 1 - 2 - 1) / n)
    assert found["loose"] == pytest.approx(100 * (n - 0.5 * 1 - 1 - 1) / n)
    assert found["S1"] == 60 and found["S2"] == 60 and found["S3"] is None and found["groups"] == 5
    assert found["rates"]["RM_strict"] == pytest.approx(100 * 2 / 3, abs=1e-5)


def test_wemaths_groups_may_be_partial():
    rows = wemath_rows(2)[:-1] + wemath_rows(3, ("2steps_1",))[-1:]
    found = numbers("wemath", rows, "A" * len(rows), "kit")
    assert found["groups"] == 1 and found["partial_groups"] == 2 and found["score"] == 100
    found = numbers("wemath", rows[:1], "B", "kit")
    assert found["score"] == 0 and found["rates"]["RM_strict"] == 0 and found["groups"] == 0


# ---------------------------------------------------------------------- A-OKVQA, RealWorldQA, MMStar


def test_aokvqas_own_file(tmp_path):
    own = [{"split": "val", "image_id": 299207, "question_id": "22ju", "question": "q", "choices": ["a", "b", "c", "d"],
            "correct_choice_idx": 3, "direct_answers": ["d"]}]  # fmt: skip
    file = tmp_path / "aokvqa_v1p0_val.json"
    file.write_text(json.dumps(own))
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "000000299207.jpg").write_bytes(png(1))
    (row,) = benchmark("aokvqa").load(tmp_path, tmp_path / "unpacked")
    assert row.gold == ("D",) and row.index == "22ju" and row.images[0].read_bytes() == png(1)
    assert [decided("aokvqa", row, reply, "official") for reply in ("d", "D", "(D)", "a", "?!")] == [
        1,
        1,
        1,
        0,
        "letter",
    ]
    file.write_text(json.dumps([own[0] | {"correct_choice_idx": None}]))
    with pytest.raises(InputError, match="test has no answers"):
        benchmark("aokvqa").load(tmp_path, None)


@pytest.mark.parametrize("name", ["aokvqa", "realworldqa", "mmstar", "wemath"])
def test_tables_with_options_are_put_line_by_line(tmp_path, name):
    cells = choices(1, hint="Look.", C="", ID="2steps_1", key="2steps_1", D="nan")
    (row,) = benchmark(name).load(table(tmp_path / "a.tsv", [cells]), None)
    asked = benchmark(name).put(row).split("\n")
    assert asked[0].endswith("Look.") and asked[1].endswith("Which?") and asked[3:6] == ["A. red", "B. blue", "D. nan"]
    assert len(asked) == (6 if name == "wemath" else 7)
    assert [decided(name, row, "B", mode) for mode in MODES] == [1, 1]


@pytest.mark.parametrize("reply, official", [
    ("B", 1), ("b) yes", 1), ("(B)", 1), ("Option B", 1), ("The answer is B", 1), ("The answer is A", 0),
    ("It is B", 0), ("", 0),
    ("Blue whales", 1), ("Answer: B", 0),
])  # fmt: skip
def test_mmstars_own_scorer_reads_the_beginning(tmp_path, reply, official):
    own = [
        {
            "index": 0,
            "question": "Which?\nOptions: A: red, B: blue",
            "answer": "B",
            "category": "math",
            "l2_category": "x",
        }
    ]
    (row,) = benchmark("mmstar").load(lines(tmp_path / "mmstar.jsonl", own), None)
    assert benchmark("mmstar").put(row) == own[0]["question"] and row.options == {"A": "red", "B": "blue"}
    assert decided("mmstar", row, reply, "official") == official


def test_realworldqa_without_options(tmp_path):
    own = [{"image": "1.webp", "question": "How many? Answer with a number.", "answer": "3"}]
    (row,) = benchmark("realworldqa").load(lines(tmp_path / "annotations.json", own), None)
    assert [decided("realworldqa", row, reply, "official") for reply in ("3", "3.", "three", "It is 3")] == [1, 1, 0, 0]
    assert [decided("realworldqa", row, reply, "kit") for reply in ("3", "It is 3")] == [1, "extract"]


# ---------------------------------------------------------------------- POPE


@pytest.mark.parametrize("reply, official, kit", [
    ("Yes", "Yes", "Yes"), ("No", "No", "No"), ("no.", "No", "No"), ("There is not. Yes", "No", "Yes"),
    ("Nothing", "Yes", None),
    ("Yes. There is no dog", "Yes", None), ("**No**", "Yes", None), ("No, there is", "No", "No"), ("", "Yes", None),
    ("NO", "Yes", "No"), ("No\n", "Yes", "No"),
])  # fmt: skip
def test_popes_two_readings(reply, official, kit):
    row = Row("1", "q", ("Yes",), facts={"splits": ("random",)})
    found = [getattr(benchmark("pope"), mode)(row, reply, None) for mode in MODES]
    assert [verdict.read if isinstance(verdict, Verdict) else None for verdict in found] == [official, kit]


def test_popes_table_counts_in_every_split_and_its_own_files_do_too(tmp_path):
    labels = {"random": ["yes", "no", "no"], "popular": ["yes", "no"], "adversarial": ["yes", "no"]}
    (tmp_path / "own").mkdir()
    for split, found in labels.items():
        own = [
            {"question_id": at, "image": f"{at}.jpg", "text": f"Is {at}?", "label": label}
            for at, label in enumerate(found, 1)
        ]
        lines(tmp_path / "own" / f"coco_pope_{split}.json", own)
    rows = benchmark("pope").load(tmp_path / "own", None)
    assert [row.index for row in rows] == [str(number) for number in range(7)]
    assert [row.facts["splits"] for row in rows] == [("adversarial",)] * 2 + [("popular",)] * 2 + [("random",)] * 3
    assert rows[0].cluster == rows[2].cluster == rows[4].cluster == "1.jpg"
    joined = [("adversarial,popular,random", "Yes"), ("adversarial,popular,random", "No"), ("random", "No")]
    cells = [{"index": at, "image": base64_of(at), "question": f"Is {at}?", "category": splits, "answer": label}
             for at, (splits, label) in enumerate(joined)]  # fmt: skip
    once = benchmark("pope").load(table(tmp_path / "POPE.tsv", cells), None)
    said = {"Is 1?": "Yes", "Is 2?": "No", "Is 3?": "Yes", "Is 0?": "Yes"}
    own = numbers("pope", rows, [said[row.question] for row in rows], "kit")
    table_ = numbers("pope", once, ["Yes", "No", "Yes"], "kit")
    assert own["rows"] == own["pooled_rows"] == table_["pooled_rows"] == 7 and table_["rows"] == 3
    for key in ("f1", "accuracy", "precision", "recall", "yes_share", "random", "popular", "adversarial", "score"):
        assert own[key] == table_[key], key
    assert own["random"] == {
        "f1": 66.666667,
        "accuracy": 66.666667,
        "precision": 50,
        "recall": 100,
        "yes_share": 66.666667,
    }


def test_an_unreadable_answer_is_no_yes_and_wrong():
    rows = [Row(str(at), "q", (gold,), facts={"splits": ()}) for at, gold in enumerate(("Yes", "No", "No"))]
    found = numbers("pope", rows, ["Yes", "**No**", "**Yes**"], "kit")
    assert found["f1"] == 100 and found["accuracy"] == pytest.approx(33.333333) and found["undecided"] == 2
    nothing = numbers("pope", rows[1:], ["No", "No"], "kit")
    assert nothing["f1"] == nothing["precision"] == nothing["recall"] == 0 and nothing["accuracy"] == 100


def test_one_split_of_pope_has_its_own_ids(tmp_path):
    own = [{"question_id": at, "image": "1.jpg", "text": "q", "label": "no"} for at in (1, 2)]
    rows = benchmark("pope").load(lines(tmp_path / "coco_pope_popular.json", own), None)
    assert [row.index for row in rows] == ["1", "2"] and rows[0].facts["splits"] == ("popular",)
