"""Marks, options and final answers of published texts."""

import pytest

from capcur_jax.data.problem import BadRow
from capcur_jax.data.sources import wording


def reason(function, *arguments):
    with pytest.raises(BadRow) as caught:
        function(*arguments)
    return caught.value.args[0]


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("What?", 0, "What?"),
        ("What?", 2, "<image>\n<image>\nWhat?"),
        ("What <image1> and <image2>?", 2, "What <image> and <image>?"),
        ("<image>\nPart <image2>?", 1, "<image>\nPart <image2>?"),
    ],
)
def test_marks(text, images, expected):
    assert wording.marked(text, images) == expected


def test_marks_that_differ_from_the_images():
    assert reason(wording.marked, "<image1><image2>", 1) == "marks and images differ"
    assert reason(wording.marked, "<image>", 0) == "marks and images differ"


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["A) 5", "B) 6"], "A. 5\nB. 6"),
        (["(a) 5", "(b) 6"], "A. 5\nB. 6"),
        (["A: x", "B: y"], "A. x\nB. y"),
        (["5", "6"], "A. 5\nB. 6"),
        (["B) 5", "A) 6"], "A. B) 5\nB. A) 6"),
        (["A", "B", "C"], "Choices: A, B, C"),
        (["A)", "B)"], "Choices: A, B"),
        (["C", "A"], "A. C\nB. A"),
        (["A.5", "B.6"], "A. 5\nB. 6"),
        (["Apples", "Bears"], "A. Apples\nB. Bears"),
    ],
)
def test_options_become_lines(options, lines):
    assert wording.with_options("Which? ", options)[0] == f"Which?\n{lines}"


def test_options_that_cannot_be_asked():
    for options in (["one"], [], ["one", " "], ["x"] * 27, ["A) 1", "B)"]):
        assert reason(wording.with_options, "Which?", options) == "bad options"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Which?\nChoices:\nA:40°\nB:60°", ("Which?", ["40°", "60°"])),
        ("Which? Choices: A. 1.5 B. 2 C. 3.", ("Which?", ["1.5", "2", "3."])),
        ("Which?\n(A) one two\n(B) three", ("Which?", ["one two", "three"])),
        ("Triangle A. B. is right. Which?", ("Triangle A. B. is right. Which?", [])),
        ("Choices: none", ("Choices: none", [])),
        ("Which?\nA. only", ("Which?\nA. only", [])),
        ("Choices: B. 1 A. 2", ("Choices: B. 1 A. 2", [])),
    ],
)
def test_choices_at_the_end_of_a_text(text, expected):
    assert wording.split_choices(text) == expected


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("b", "B"), ("(C)", "C"), ("B.", "B"), ("B) 60°", "B"), ("60°", "B"), ("$60°$", "B"), (" a ", "A")],
)
def test_choice_by_letter_or_text(answer, letter):
    assert wording.choice(answer, ["40°", "60°", "A line"]) == letter


def test_choices_that_are_none_or_two():
    assert reason(wording.choice, "D", ["40°", "60°"]) == "answer is no option"
    assert reason(wording.choice, "", ["40°", "60°"]) == "answer is no option"
    assert reason(wording.choice, "A", ["4.0", "3", "4.0"]) == "ambiguous options"
    assert wording.choice("B", ["4.0", "3", "4.0"]) == "B"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So $\boxed{\frac{1}{2}}$ is it.", r"\frac{1}{2}"),
        ("It follows.\nAnswer:C", "C"),
        ("The answer is B. Answer: C", "C"),
        ("Therefore, the answer is (D) 40.", "(D) 40"),
        ("**Answer:** 3.5.", "3.5"),
        ("The final answer is: $x + 1$.", "x + 1"),
        ("Therefore the correct option is B.", "B"),
        ("3 + 4\n#### 7", "7"),
        ("Answer:\nred", "red"),
    ],
)
def test_final_answers(solution, answer):
    assert wording.final_answer(solution) == answer


@pytest.mark.parametrize(
    "solution",
    ["", "It is 5.", "The answer is", "Answer: " + "x" * 80, "The answer is that all of them are right", r"\boxed{}"],
)
def test_solutions_without_a_final_answer(solution):
    assert reason(wording.final_answer, solution) == "no final answer"


def test_instructions_are_taken_out():
    asked = "<image>\nFirst reason, then select one in the format: Answer: xxx.\nQuestion: How many?\nChoices:\nA: 1"
    assert wording.without_instruction(asked) == "<image>\nHow many?\nChoices:\nA: 1"
    assert wording.without_instruction("Hint: Answer with a letter.\nQuestion: Why?") == "Why?"
    assert wording.without_instruction("In question: why?") == "In question: why?"
