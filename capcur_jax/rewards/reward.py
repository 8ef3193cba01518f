"""The reward of a response: weighted accuracy and format (as in the paper), or a function of the user's own."""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from absl import logging

from capcur_jax.answers import kinds
from capcur_jax.answers import response as extract
from capcur_jax.data.problem import Problem
from capcur_jax.rewards.grade import Grader

RewardFunction = Callable[[Problem, str], float | dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Score:
    """What one response earned. Of the project's own reward, `accuracy` and `format` are 0.0 or 1.0."""

    reward: float
    accuracy: float
    format: float
    answer: str | None  # contents of the last \boxed{}, as the response wrote them


@functools.lru_cache(65536)
def gold_of(problem: Problem) -> kinds.Gold:
    """What the grader compares with: the accepted answers, their kind, and what the question says of them."""
    return kinds.gold_of(problem.answer, getattr(problem, "answers", ()), problem.answer_type, problem.problem)


class Reward:
    """Scores responses by a grader or by the user's function (whose `name` is for messages); see `make_reward`."""

    def __init__(
        self,
        accuracy_weight: float,
        format_weight: float,
        grader: Grader | None = None,
        function: RewardFunction | None = None,
        name: str = "",
    ):
        self._grader = grader
        self._accuracy_weight = accuracy_weight
        self._format_weight = format_weight
        self._function = function
        self._name = name
        self._errors = 0

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Score]:
        """Scores response i as an answer to problem i.

        Raises:
          ValueError: the lengths differ.
          RuntimeError: the user's function failed for every response, or the grader can't start.
        """
        if len(problems) != len(responses):
            raise ValueError(f"{len(problems)} problems and {len(responses)} responses: give one problem per response")
        if self._function is not None:
            return self._score_by_function(problems, responses)
        answers = [extract.last_boxed(response) for response in responses]
        correct = self._grader.grade([(a, gold_of(problem)) for a, problem in zip(answers, problems, strict=True)])
        scores = []
        for response, answer, is_correct in zip(responses, answers, correct, strict=True):
            accuracy, form = float(is_correct), float(extract.is_formatted(response))
            reward = self._accuracy_weight * accuracy + self._format_weight * form
            scores.append(Score(reward=reward, accuracy=accuracy, format=form, answer=answer))
        return scores

    def counters(self) -> dict[str, int]:
        """Totals since the start: pairs the grader gave up on, and responses the user's function failed on."""
        return {
            "grader_timeouts": self._grader.timeouts if self._grader else 0,
            "grader_failures": self._grader.failures if self._grader else 0,
            "reward_errors": self._errors,
        }

    def close(self) -> None:
        """Ends the grader's workers."""
        if self._grader:
            self._grader.close()

    def _score_by_function(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Score]:
        scores, failures, last_error = [], 0, None
        for problem, response in zip(problems, responses, strict=True):
            answer, form = extract.last_boxed(response), float(extract.is_formatted(response))
            try:
                score = _read_result(self._function(problem, response), form, answer)
            except Exception as error:  # one odd response must not end a run of hours; a broken function does, below
                if self._errors == 0:
                    logging.exception(
                        "config.reward.function %s failed for problem %s; the response scores 0. Later failures are "
                        "only counted (reward_errors).",
                        self._name,
                        problem.id,
                    )
                self._errors += 1
                failures += 1
                last_error = error
                score = Score(reward=0.0, accuracy=0.0, format=form, answer=answer)
            scores.append(score)
        if scores and failures == len(scores):
            raise RuntimeError(
                f"config.reward.function {self._name} failed for all {len(scores)} responses of a batch; the last "
                f"error: {type(last_error).__name__}: {last_error}"
            ) from last_error
        return scores


def make_reward(config: ml_collections.ConfigDict) -> Reward:
    """Builds the reward of `config.reward`.

    Args:
      config: accuracy_weight and format_weight; function, "" for the project's own reward or "module:function" for
        the user's; workers, timeout_s and memory_mb of the grader (see `Grader`).

    The user's function is called as `function(problem: Problem, response: str)` in this process, one response after
    the other, and returns the reward as a number or a dict: `reward`, and if it likes `accuracy` (default: the reward)
    and `format` (default: the project's own, 0 or 1), which are logged. The weights play no part. An exception, or a
    result that is no finite number, scores 0 and is counted.

    Raises:
      ValueError: a setting is wrong; the message names it.
      RuntimeError: the parser of formulas is not installed.
    """
    weights = {name: config[name] for name in ("accuracy_weight", "format_weight")}
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"config.reward.{name} is {weight}; set it to a finite number of 0 or more")
    settings = {name: config[name] for name in ("workers", "timeout_s", "memory_mb")}
    name = config.function
    function = _load_function(name) if name else None
    grader = None if function else Grader(**settings)
    return Reward(**weights, grader=grader, function=function, name=name)


def _load_function(spec: str) -> RewardFunction:
    """The function that "module:function" names."""

    def problem_with(what: str) -> ValueError:
        return ValueError(f"config.reward.function is {spec!r}: {what}")

    module_name, colon, attribute = spec.partition(":")
    if not (colon and module_name and attribute):
        raise problem_with('write it as "module:function", for example "my_rewards:score"')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs here, and may raise anything
        raise problem_with(
            f"importing {module_name} failed ({type(error).__name__}: {error}); give the dotted name of a module, and "
            "add the folder that holds it to PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise problem_with(
            f"{module_name} ({getattr(module, '__file__', 'built in')}) has no {attribute}; define it there"
        )
    if not callable(function):
        raise problem_with(f"it is a {type(function).__name__}; name a function of (problem, response)")
    return function


def _read_result(result: Any, form: float, answer: str | None) -> Score:
    """The score in what the user's function returned. Raises TypeError or ValueError."""
    values = result if isinstance(result, dict) else {"reward": result}
    unknown = values.keys() - {"reward", "accuracy", "format"}
    if "reward" not in values or unknown:
        raise ValueError(f"the keys are {list(values)}; return reward and, if you like, accuracy and format")
    numbers = {key: _number(key, value) for key, value in values.items()}
    return Score(**({"accuracy": numbers["reward"], "format": form, "answer": answer} | numbers))


def _number(key: str, value: Any) -> float:
    if not hasattr(type(value), "__float__"):  # text has none, numbers of numpy, jax and torch do
        raise TypeError(f"{key} is a {type(value).__name__}; return a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{key} is {number}; return a finite number")
    return number
