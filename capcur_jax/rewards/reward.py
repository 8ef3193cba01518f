"""The reward of a response: weighted accuracy and format (as in the paper), or a function of the user's own."""

import dataclasses
import functools
import math
import os
import threading
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import logging

from capcur_jax.answers import kinds
from capcur_jax.answers import response as extract
from capcur_jax.data.problem import Problem
from capcur_jax.rewards.function import Function, Outcome, result, share
from capcur_jax.rewards.grade import Grader


@dataclasses.dataclass(frozen=True)
class Score:
    """What one response earned. Of the project's own reward, `accuracy` and `format` are 0.0 or 1.0. An accuracy
    that the user's function did not give, and its reward is not, is NaN."""

    reward: float
    accuracy: float
    format: float
    answer: str | None  # contents of the last \boxed{}, as the response wrote them
    timed_out: bool = False  # there was no verdict in time, which counts as wrong and depends on the host
    error: str = ""  # why the user's function gave no result, which scores 0


_gold_of = functools.lru_cache(4096)(kinds.gold_of)  # by texts: a Problem as the key would be kept, with all it holds


def gold_of(problem: Problem) -> kinds.Gold:
    """What the grader compares with: the accepted answers, their kind, and what the question says of them."""
    return _gold_of(problem.answer, problem.answers, problem.answer_type, problem.problem)


class Reward:
    """Scores responses by a grader or by the user's function; see `make_reward`.

    Attributes:
      parallel: groups of a batch that are worth scoring at a time, each by a call of `score` from a thread of its own;
        0: a batch is scored as a whole, since the user's function asks for that.
    """

    def __init__(
        self,
        accuracy_weight: float,
        format_weight: float,
        grader: Grader | None = None,
        function: Function | None = None,
    ):
        self._grader = grader
        self._accuracy_weight = accuracy_weight
        self._format_weight = format_weight
        self._function = function
        self._errors, self._told, self._counting = 0, set(), threading.Lock()
        self.parallel = (function or grader).parallel

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Score]:
        """Scores response i of a batch as an answer to problem i.

        Raises:
          ValueError: the lengths differ.
          RuntimeError: the user's function failed for every response, or the grader can't start.
        """
        scores = self.score(problems, responses)
        self.check(scores)
        return scores

    def check(self, scores: Sequence[Score]) -> None:
        """Raises RuntimeError where the user's function failed for every response of a batch: one odd response must not
        end a run of hours; a broken function does."""
        if len(scores) > 1 and all(score.error for score in scores):
            raise RuntimeError(
                f"config.reward.function {self._function.spec} failed for all {len(scores)} responses of a batch; the "
                f"last error: {scores[-1].error}"
            )

    def score(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Score]:
        """The same for a part of a batch. Raises as a call does, but for a function that fails for every response."""
        if len(problems) != len(responses):
            raise ValueError(f"{len(problems)} problems and {len(responses)} responses: give one problem per response")
        if self._function is not None:
            return self._score_by_function(problems, responses)
        answers = [extract.last_boxed(response) for response in responses]
        verdicts = self._grader.judge([(a, gold_of(problem)) for a, problem in zip(answers, problems, strict=True)])
        scores = []
        for response, answer, verdict in zip(responses, answers, verdicts, strict=True):
            accuracy, form = float(verdict.correct), float(extract.is_formatted(response))
            reward = self._accuracy_weight * accuracy + self._format_weight * form
            scores.append(Score(reward, accuracy, form, answer, verdict.timed_out))
        return scores

    def counters(self) -> dict[str, int]:
        """Totals since the start: pairs the grader gave up on, and responses the user's function failed on."""
        function = self._function
        own = {}
        if function:
            own = {"reward_timeouts": function.timeouts, "reward_failures": function.failures}
            own["reward_batches_repeated"] = function.repeated
        return {
            "grader_timeouts": self._grader.timeouts if self._grader else 0,
            "grader_failures": self._grader.failures if self._grader else 0,
            "reward_errors": self._errors,
            **own,
        }

    def close(self) -> None:
        """Ends the workers."""
        for part in (self._grader, self._function):
            if part:
                part.close()

    def _score_by_function(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Score]:
        scores = []
        for problem, response, outcome in zip(problems, responses, self._function(problems, responses), strict=True):
            answer, form = extract.last_boxed(response), float(extract.is_formatted(response))
            if outcome.values is None:
                self._failed(problem, outcome)
                scores.append(Score(0.0, 0.0, form, answer, outcome.timed_out, outcome.error))
            else:
                scores.append(_read_result(outcome.values, form, answer))
                if math.isnan(scores[-1].accuracy):
                    self._without_accuracy(outcome.values["reward"])
        return scores

    def _without_accuracy(self, reward: float) -> None:
        """Tells once that a reward on another scale is no accuracy."""
        if self._first("accuracy"):
            logging.warning(
                "config.reward.function %s gave the reward %g and no accuracy. A reward outside 0 to 1 is not taken "
                'for one: accuracy shows as "-", and no step is the best of its validations. Return {"reward": ..., '
                '"accuracy": ...}, with an accuracy from 0 to 1.',
                self._function.spec,
                reward,
            )

    def _failed(self, problem: Problem, outcome: Outcome) -> None:
        """Counts a response that has no result. The first of each kind is shown."""
        kind = "reward_timeouts" if outcome.timed_out else "reward_errors"
        with self._counting:
            self._errors += not outcome.timed_out
        if self._first(kind):
            logging.error(
                "config.reward.function %s failed for problem %s; the response scores 0. Later failures of this kind "
                "are only counted (%s). %s",
                self._function.spec,
                problem.id,
                kind,
                outcome.error,
            )

    def _first(self, kind: str) -> bool:
        """Whether this is the first of its kind, which is told."""
        with self._counting:
            first = kind not in self._told
            self._told.add(kind)
        return first


def workers(asked: int) -> int:
    """Processes for `config.reward.workers`: 0 asks for half of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or max(1, cores // 2)


def make_reward(config: ml_collections.ConfigDict) -> Reward:
    """Builds the reward of `config.reward`.

    Args:
      config: accuracy_weight and format_weight; function, "" for the project's own reward or "module:function" for
        the user's; workers (see `workers`), timeout_s and memory_mb of the grader (see `Grader`) or of the function
        (see `Function`).

    The user's function is called as `function(problem: Problem, response: str)` in worker processes, and returns the
    reward as a number or a dict: `reward`, and if it likes `accuracy` (default: the reward where that is from 0 to 1,
    else NaN) and `format` (default: the project's own, 0 or 1), which are logged. The weights
    play no part. An exception, a result that is no finite number, or none in time scores 0 and is counted;
    docs/rewards.md has the rest.

    Raises:
      ValueError: a setting is wrong, or no worker for the user's function can start; the message names it.
      RuntimeError: the parser of formulas is not installed.
    """
    weights = {name: config[name] for name in ("accuracy_weight", "format_weight")}
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"config.reward.{name} is {weight}; set it to a finite number of 0 or more")
    settings = {"workers": workers(config.workers)} | {name: config[name] for name in ("timeout_s", "memory_mb")}
    if config.function:
        return Reward(**weights, function=Function(config.function, **settings))
    return Reward(**weights, grader=Grader(**settings))


def _read_result(found: Any, form: float, answer: str | None) -> Score:
    """The score in what the user's function returned. Raises TypeError or ValueError."""
    numbers = result(found)
    return Score(**({"accuracy": share(numbers["reward"]), "format": form, "answer": answer} | numbers))
