"""Rewards of whole responses: weights, the user's own function, and its failures."""

import logging
import sys
import textwrap

import ml_collections
import numpy as np
import pytest

from capcur_jax.data.problem import Problem
from capcur_jax.rewards import reward

FORMATTED = r"<think>so</think> \boxed{%s}"


def _config(**changes) -> ml_collections.ConfigDict:
    settings = {"accuracy_weight": 0.9, "format_weight": 0.1, "function": "", "workers": 1, "timeout_s": 2.0}
    return ml_collections.ConfigDict(settings | {"memory_mb": 512} | changes)


def _problems(*answers: str) -> list[Problem]:
    return [Problem(id=str(i), problem="?", answer=answer) for i, answer in enumerate(answers)]


@pytest.fixture
def own(monkeypatch, tmp_path):
    """Writes a module of the user's and returns its name."""
    (tmp_path / "own_rewards.py").write_text(
        textwrap.dedent("""
        import numpy as np

        number = 5

        def length(problem, response):
            return np.float32(len(response))

        def parts(problem, response):
            return {"reward": 2.0, "accuracy": 1, "format": 0.5}

        def picky(problem, response):
            return {"crash": 1 / 0 if response == "crash" else 0, "nan": float("nan"), "text": "1.0",
                    "keys": {"reward": 1.0, "speed": 3}, "none": None}.get(response, 1.0)
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


def test_weights():
    score = reward.make_reward(_config())
    responses = [FORMATTED % "5", r"\boxed{5}", FORMATTED % "6", "5"]
    results = score(_problems(*["5"] * 4), responses)
    assert [r.reward for r in results] == pytest.approx([1.0, 0.9, 0.1, 0.0])
    assert [r.accuracy for r in results] == [1.0, 1.0, 0.0, 0.0]
    assert [r.format for r in results] == [1.0, 0.0, 1.0, 0.0]
    assert [r.answer for r in results] == ["5", "5", "6", None]
    assert score.counters() == {"grader_timeouts": 0, "grader_failures": 0, "reward_errors": 0}
    score.close()


def test_other_weights():
    score = reward.make_reward(_config(accuracy_weight=0.5, format_weight=0.0))
    assert score(_problems("B"), [FORMATTED % "(B)"])[0].reward == 0.5


def test_hanging_response_is_counted():
    score = reward.make_reward(_config(timeout_s=1.5))
    results = score(_problems(r"\pi", r"\pi"), [FORMATTED % "9^{9^{9^9}}", FORMATTED % r"\frac{2\pi}{2}"])
    assert [r.reward for r in results] == pytest.approx([0.1, 1.0])
    assert score.counters()["grader_timeouts"] == 1
    score.close()


def test_each_response_needs_its_problem():
    with pytest.raises(ValueError, match="1 problems and 2 responses"):
        reward.make_reward(_config())(_problems("5"), ["a", "b"])


@pytest.mark.parametrize("name", ["accuracy_weight", "format_weight"])
@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_bad_weight(name, weight):
    with pytest.raises(ValueError, match=f"config.reward.{name}"):
        reward.make_reward(_config(**{name: weight}))


def test_own_function(own):
    responses = ["abc", FORMATTED % "5"]
    results = reward.make_reward(_config(function=f"{own}:length"))(_problems("5", "5"), responses)
    assert [r.reward for r in results] == [r.accuracy for r in results] == [float(len(r)) for r in responses]
    assert [r.format for r in results] == [0.0, 1.0]
    assert results[1].answer == "5"
    (result,) = reward.make_reward(_config(function=f"{own}:parts"))(_problems("5"), ["abc"])
    assert (result.reward, result.accuracy, result.format) == (2.0, 1.0, 0.5)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("no_colon", "module:function"),
        (":f", "module:function"),
        ("own_rewards:", "module:function"),
        ("no_such_module_here:f", "importing no_such_module_here failed.*PYTHONPATH"),
        ("own_rewards:missing", "has no missing"),
        ("own_rewards:number", "it is a int"),
    ],
)
def test_bad_function(own, spec, message):
    with pytest.raises(ValueError, match=rf"config\.reward\.function is '{spec}': .*{message}"):
        reward.make_reward(_config(function=spec))


def test_failures_of_own_function_score_zero_and_are_counted(own, caplog):
    score = reward.make_reward(_config(function=f"{own}:picky"))
    # absl's logger is not always a child of the root logger that caplog listens to.
    logging.getLogger("absl").addHandler(caplog.handler)
    try:
        responses = ["fine", "crash", "nan", "text", "keys", "none"]
        results = score(_problems(*["5"] * 6), responses)
    finally:
        logging.getLogger("absl").removeHandler(caplog.handler)
    assert [r.reward for r in results] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert score.counters()["reward_errors"] == 5
    assert "ZeroDivisionError" in caplog.text and "own_rewards:picky" in caplog.text
    assert "TypeError" not in caplog.text  # only the first is logged
    assert score(_problems(), []) == []


def test_function_that_always_fails_ends_the_run(own):
    score = reward.make_reward(_config(function=f"{own}:picky"))
    with pytest.raises(RuntimeError, match=r"own_rewards:picky failed for all 2 responses.*finite"):
        score(_problems("5", "5"), ["crash", "nan"])


@pytest.mark.parametrize("value", [1, True, 0.5, np.float32(0.5), np.array(0.5)])
def test_numbers_of_any_kind(value):
    assert reward._read_result(value, 1.0, None).reward == float(value)
