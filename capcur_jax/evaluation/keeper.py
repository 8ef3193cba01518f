"""What a training run keeps of its evaluations: the files that `capcur_jax.evaluate` writes, of each moment."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.devices import distributed
from capcur_jax.evaluation import asking, local, outcome
from capcur_jax.evaluation.benchmarks import capability
from capcur_jax.evaluation.benchmarks.base import MODES, Reply, Verdict
from capcur_jax.evaluation.folders import Answered
from capcur_jax.rewards.reward import Score
from capcur_jax.rollout.engine import Sample, Sampling

VALIDATION = "validation-"  # and the step: the name of a validation's folder
Keep = Callable[[int, str, "Sample | None", "Score | None"], None]


class Keeper:
    """Gathers the answers of an evaluation, and writes them.

    The verdicts are the reward's: both modes have the same. `metrics.jsonl` and the summary have its figures too.

    Args:
      folder: gives the one of a moment; its argument is "base", a stage's name, or "" for a validation.
      facts: gives what tells the model and the run, at that moment.
    """

    def __init__(self, folder: Callable[[str], Path], facts: Callable[[], Mapping[str, Any]]):
        self._folder, self._facts = folder, facts
        self._sets: dict[str, tuple[Sequence[Problem], list[list[Any]]]] = {}

    def begin(self, name: str, problems: Sequence[Problem], builder: PromptBuilder) -> Keep:
        """What is to be told of the answers of a set (see heldout.evaluate)."""
        answers: list[list[Any]] = []
        self._sets[name] = problems, answers

        def keep(place: int, text: str, sample: Sample | None, score: Score | None) -> None:
            if sample is None or score is None:
                why = builder.skipped.get(problems[place], "refused by the engine")
                answers.append([place, Reply("", failed=why), None, None])
            else:
                reply = Reply(text, sample.finish, len(sample.tokens))
                answers.append([place, reply, score.accuracy, score.answer])

        return keep

    def write(self, label: str, asked: Mapping[str, Any], sampling: Sampling, builder: PromptBuilder) -> None:
        """Writes what was told since the last time. Of several processes all call it, and process 0 writes."""
        sets, self._sets = self._sets, {}
        parts = distributed.gather(json.dumps({name: answers for name, (_, answers) in sets.items()}).encode())
        if not distributed.is_owner():
            return
        conditions = {
            **self._facts(), **asked, **asking.sampled(sampling, builder.placement), **local.seen(builder.processor)
        }  # fmt: skip
        answered: dict[str, list[Answered]] = {}
        for name, (problems, _) in sets.items():
            told = {place: (reply, *rest) for part in parts for place, reply, *rest in json.loads(part)[name]}
            answered[name] = [_answered(problem, *told[place]) for place, problem in enumerate(problems)]
        scores = {
            name: outcome.outcome(rows, capability.benchmark(name).metrics, {}) for name, rows in answered.items()
        }
        outcome.write(self._folder(label), {"conditions": conditions, "benchmarks": scores}, answered)


def drop_validations(folder: Path, records: Sequence[Mapping[str, Any]], keep: int, complete: float = math.inf) -> None:
    """Removes all validations but the last `keep` and the best, as checkpoints go; of equal ones the first is the best.
    Those of steps without a record go, too: the run was killed behind them, and went on from before.

    Args:
      folder: WORKDIR/evaluation.
      records: of the run's validations, in their order.
      complete: checkpoints of steps below it are complete. A run that is killed goes on from one of these, so that a
        validation of a later step stays, but takes no place.
    """
    sure = [record for record in records if record["step"] < complete]
    rated = [record for record in sure if (share := record["accuracy"]) is not None and math.isfinite(share)]
    best = [max(rated, key=lambda record: record["accuracy"])] if rated else []
    kept = {f"{VALIDATION}{record['step']}" for record in [*best, *sure[-keep:], *records[len(sure) :]]}
    for path in folder.glob(f"{VALIDATION}*"):
        if path.name not in kept and path.name.removeprefix(VALIDATION).isdecimal():
            shutil.rmtree(path, ignore_errors=True)  # the next time finds what is left


def _answered(problem: Problem, reply: list[Any], accuracy: float | None, answer: str | None) -> Answered:
    """A reward on a scale of its own gives no verdict."""
    row, verdicts = capability.row_of(problem), {}
    credit = 0.0 if accuracy is None else accuracy
    if math.isfinite(credit):
        verdict = Verdict(min(1.0, max(0.0, credit)), "rule", answer)
        verdicts = dict.fromkeys(MODES, verdict)
    return Answered(row, Reply(*reply), verdicts)
