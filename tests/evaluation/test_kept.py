"""What the base scored is found again by what was asked, and by nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from capcur_jax.data.sets import Sets
from capcur_jax.evaluation import kept
from tests import tiny


@pytest.fixture
def setting(checkpoint, sets, tmp_path):
    """setting(**changes): a config and its sets; what they keep lies in one folder."""

    def make(**changes):
        config = tiny.config(checkpoint, sets, **{"evaluation.base_results": str(tmp_path / "base")})
        config.update_from_flattened_dict(changes)
        return config, Sets(config.data, tmp_path / "data")

    return make


def test_the_same_question_is_asked_once_and_what_lay_beside_comes_with_it(setting, tmp_path):
    asked = []

    def evaluate(workdir):
        def ask():
            asked.append(workdir.name)
            (workdir / kept.FOLDER / "predictions").mkdir(parents=True)
            (workdir / kept.FOLDER / "predictions" / "text.tsv").write_text("id\tright\n")
            return [{"capability": "text", "accuracy": 0.5, "standard_error": math.nan}]

        return ask

    first, second = tmp_path / "first", tmp_path / "second"
    for workdir in (first, second):
        workdir.mkdir()
        (result,) = kept.once(*setting(), workdir, evaluate(workdir))
        assert (result["capability"], result["accuracy"]) == ("text", 0.5)
        assert (workdir / kept.FOLDER / "predictions" / "text.tsv").read_text() == "id\tright\n"
    assert asked == ["first"]
    (entry,) = (tmp_path / "base").iterdir()  # nothing half-written is left
    assert json.loads((entry / kept.RESULTS).read_text()) == [result]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"seed": 5}, True), ({"order": ("text",)}, True), ({"stages.text.steps": 9}, True),
        ({"reward.workers": 1}, True), ({"evaluation.base_results": "elsewhere"}, True),
        ({"objective.clip_low": 0.1}, True),
        ({"seed": 5, "evaluation.temperature": 0.6}, False), ({"evaluation.questions": 3}, False),
        ({"evaluation.sets": ("text",)}, False), ({"prompt.instruction": "system"}, False),
        ({"rollout.max_new_tokens": 4}, False), ({"reward.function": "tests.own_rewards:by_length"}, False),
        ({"model.dtype": "bfloat16"}, False), ({"evaluation.split": "validation"}, False),
    ],
)  # fmt: skip
def test_a_key_changes_with_what_the_answers_depend_on(setting, changes, same):
    assert (kept.key(*setting()) == kept.key(*setting(**changes))) is same


def test_the_dtype_is_that_of_what_answers(setting):
    served = {"rollout.engine": "sglang", "rollout.sglang.dtype": "float32"}
    assert kept.key(*setting(**served)) != kept.key(*setting(**served | {"rollout.sglang.dtype": "bfloat16"}))
    assert kept.key(*setting(**served)) == kept.key(*setting(**served, **{"rollout.sglang.servers": 2}))
    assert kept.key(*setting()) == kept.key(*setting(**{"rollout.sglang.dtype": "float32"}))


def test_another_checkpoint_and_other_questions_are_asked_anew(setting, untied_checkpoint, sets, tmp_path):
    usual = kept.key(*setting())
    assert kept.key(*setting(checkpoint=str(untied_checkpoint))) != usual
    moved = tmp_path / "moved.jsonl"
    rows = Path(sets["data.sets.text.test"]).read_text()
    moved.write_text(rows)
    assert kept.key(*setting(**{"data.sets.text.test": str(moved)})) == usual  # by content, not by place
    moved.write_text(rows.replace("+ 3", "+ 4"))
    assert kept.key(*setting(**{"data.sets.text.test": str(moved)})) != usual


def test_of_two_runs_at_once_one_keeps_its_results(setting, tmp_path):
    config, sets = setting()

    def ask():
        kept.once(config, sets, tmp_path, lambda: [{"accuracy": 0.25}])  # the other run was quicker
        return [{"accuracy": 0.25}]

    assert kept.once(config, sets, tmp_path, ask) == [{"accuracy": 0.25}]
    (entry,) = (tmp_path / "base").iterdir()
    assert json.loads((entry / kept.RESULTS).read_text()) == [{"accuracy": 0.25}]
