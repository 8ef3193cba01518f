"""The counterfactual: texts that hold the facts and never the answer, and shares without the bias of chance."""

import types

import numpy as np
import pytest

from capcur_jax.data.problem import Problem
from capcur_jax.data.sources import easy_vqa
from capcur_jax.evaluation import counterfactual
from capcur_jax.evaluation.counterfactual import outcome, reveals, twins
from capcur_jax.models.inputs import BadInput
from capcur_jax.rollout.engine import Sampling


@pytest.mark.parametrize("facts, answers, held", [
    ("A small red circle.", ["red"], True), ("A small red circle.", ["Red."], True), ("A red1 circle", ["red"], False),
    ("It costs 12 coins.", ["12"], True), ("It costs 12 coins.", ["2"], False), ("x = 0.5, y = 7", ["0.5"], True),
    ("x = 0.5, y = 7", ["5"], False), ("It is at the top left.", ["top left"], True), ("left top", ["top left"], False),
    ("A circle.", ["square", "circle"], True), ("A circle.", ["?"], False), ("Größe 3 µm", ["3 µm"], True),
])  # fmt: skip
def test_a_text_that_holds_the_answer_is_found(facts, answers, held):
    assert reveals(facts, answers) is held


def test_easy_vqas_facts_never_hold_the_answer_of_a_question_that_is_asked(tmp_path):
    rows = []
    for capability in easy_vqa.KINDS:
        for kind in easy_vqa.KINDS[capability]:
            rows += [problem for problem, _ in easy_vqa.questions(tmp_path, "test", kind, 40)]
    found, left_out = twins(rows)
    assert {twin.problem.kind for twin in found} == set(easy_vqa.KINDS["visual"])  # perception's answers are the facts
    assert len(found) == 120 and left_out == {"whose text holds the answer": 160}
    for twin in found:
        assert not reveals(twin.facts, [twin.problem.answer]) and not any(char.isdigit() for char in twin.facts)
        assert twin.told.images == () and twin.told.problem.endswith(twin.problem.problem)
        assert twin.told.answer == twin.problem.answer and "The shape is" in twin.told.problem
        assert twin.beginning in twin.facts and not reveals(twin.beginning, [twin.problem.answer])


def test_the_facts_are_enough_to_answer(tmp_path):
    image = next(image for image in easy_vqa.image_facts("test") if image.shape and image.color and image.position)
    text = counterfactual.easy_vqa_text(image)
    assert image.shape in text and image.color in text and image.position in text


def test_a_users_caption_stands_for_the_image_and_what_has_none_is_counted():
    def row(name, **kinds):
        return Problem(name, "<image>How many?", "3", **{"images": ("/x.png",), "metadata": {}} | kinds)

    good = row("a", metadata={"caption": "Some dots."})
    found, left_out = twins([good, row("b"), row("c", images=()), row("d", metadata={"caption": "3 dots"})])
    assert [twin.told.problem for twin in found] == ["Some dots. How many?"]
    assert left_out == {
        "without image": 1, "without a text of the figure": 1, "whose text holds the answer": 1
    }  # fmt: skip


def draws(rng, image, text, samples):
    """0/1 answers [questions, samples] of questions with these chances of a right answer."""
    return [(rng.random((len(rate), samples)) < rate[:, None]).astype(float) for rate in (image, text)]


def test_shares_add_up_and_are_without_bias():
    rng = np.random.default_rng(0)
    image, text = rng.beta(1, 1, 200), rng.beta(2, 1, 200)
    found = [outcome(*draws(rng, image, text, 3)) for _ in range(200)]
    expected = {
        "wrong_right": (1 - image) * text, "wrong_wrong": (1 - image) * (1 - text),
        "right_wrong": image * (1 - text), "right_right": image * text, "again": image * (1 - image),
    }  # fmt: skip
    for name, values in expected.items():
        assert np.mean([one[name][0] for one in found]) == pytest.approx(values.mean(), abs=0.004)
    four = ("wrong_right", "wrong_wrong", "right_wrong", "right_right")
    assert all(sum(one[name][0] for name in four) == pytest.approx(1) for one in found)


def test_chance_alone_limits_nothing():
    rng = np.random.default_rng(1)
    rate = rng.beta(1, 1, 300)
    found = [outcome(*draws(rng, rate, rate, 4)) for _ in range(200)]
    held = sum(one["limited"][1] <= 0 <= one["limited"][2] for one in found)
    assert 0.9 <= held / 200 <= 0.99
    assert np.mean([one["wrong_right"][0] for one in found]) > 0.1  # flips that a single sample would believe
    assert np.mean([one["wrong_right"][0] - one["again"][0] for one in found]) == pytest.approx(0, abs=0.004)


def test_a_model_that_only_fails_to_see_is_all_limited_by_perception():
    image, text = np.tile([[1, 1], [0, 0]], (20, 1)), np.ones((40, 2))
    found = outcome(image, text)
    assert found["limited_of_wrong"][0] == 1 and found["wrong_right"][0] == 0.5 and found["right_wrong"][0] == 0
    assert outcome(text, text)["limited_of_wrong"] is None
    with pytest.raises(ValueError, match="two samples"):
        outcome(image[:, :1], text)


class Builder:
    """Prompts that are their problems, with the text that a response begins with."""

    processor = types.SimpleNamespace(opened="", response=lambda tokens: tokens)

    def __init__(self):
        self.skipped = []

    def try_build(self, problem):
        return None if problem.id == "6" and not problem.images else (problem, "")

    def render(self, problem):
        return "" if problem.id != "5" else "long"

    def prompt(self, text, images):
        if text.startswith("long"):
            raise BadInput("too long")
        return None, text

    def skip(self, problem, error):
        self.skipped.append(problem.id)


def test_every_way_is_asked_and_what_can_not_be_asked_is_counted():
    dots = [Problem(str(at), "How many?", "3", ("/x.png",)) for at in range(8)]
    pairs = [counterfactual.Twin(problem, "Some dots.", "There are 3.") for problem in dots]
    asked, told, builder = [], [], Builder()

    def generate(prompts, sampling, samples, seed, images):
        asked.append((len(prompts), samples, images))
        return [
            [] if problem and problem.id == "4" else [types.SimpleNamespace(tokens=(problem, begun))] * samples
            for problem, begun in prompts
        ]

    def reward(problems, texts):
        right = [not problem or "Some dots" in problem.problem for problem, _ in texts]
        assert all(begun in ("", "<think>There are 3.") for _, begun in texts) and len(problems) == len(texts)
        return [types.SimpleNamespace(accuracy=float(one)) for one in right]

    found = counterfactual.ask(
        pairs, engine=types.SimpleNamespace(generate=generate), builder=builder, reward=reward,
        sampling=Sampling(8), seed=0, batch=4, progress=told.append,
    )  # fmt: skip
    assert found["left_out"] == {"whose prompt could not be asked": 3} and builder.skipped == ["5"]
    assert found["text"]["questions"] == 5 and found["text"]["wrong_right"][0] == found["begun"]["wrong_right"][0] == 1
    assert sum(told) == 24 and asked == [(4, 4, True)] * 2 + [(4, 4, True), (3, 4, True)] * 2
    kept = {"temperature": 1.0, "sets": {"dots": found, "none": {"left_out": {"without image": 3}}}}
    assert counterfactual.table(kept)[0] == ("dots", "text", 20, "100.0", "0.0", "0.0", "100.0")
    assert "dots, not asked: 3 whose" in counterfactual.note(kept) and "none, not asked" in counterfactual.note(kept)


def test_a_users_caption_begins_no_response():
    row = Problem("a", "How many?", "3", ("/x.png",), metadata={"caption": "<|im_end|>dots"})
    assert twins([row])[0][0].beginning == ""
