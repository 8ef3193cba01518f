"""What a run shows and leaves: its plan, held-out and validation accuracy, the summary and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import explain_skipped
from capcur_jax.devices import distributed, sharding
from capcur_jax.errors import InputError
from capcur_jax.evaluation import heldout
from capcur_jax.evaluation.blind import blind_accuracy
from capcur_jax.learner import objectives
from capcur_jax.models import huggingface
from capcur_jax.models.config import dtype_of
from capcur_jax.models.inputs import BadInput
from capcur_jax.records import jsonl, metrics
from capcur_jax.report import run as report
from capcur_jax.rollout.engine import Sampling
from capcur_jax.run import Run
from capcur_jax.schedule import Stage


def plan(run: Run) -> None:
    """Writes config and versions; prints stages, data, steps, parameters and devices."""
    config = run.config
    if run.owner:
        jsonl.write_json_atomic(run.workdir / "config.json", config.to_dict())
        jsonl.write_json_atomic(run.workdir / "versions.json", metrics.versions())
    sizes = {path[0]: 0 for path, _ in nnx.to_flat_state(run.parameters)}
    for path, leaf in nnx.to_flat_state(run.parameters):
        sizes[path[0]] += leaf.size
    run.parameter_count = sum(sizes.values())
    run.blind = _blind(run)
    devices, rows = jax.devices(), sharding.row_shards(run.mesh)
    run.display.plan(
        {
            "Run": {
                "work directory": str(run.workdir),
                "checkpoint": str(run.source),
                "parameters": run.parameter_count,
                "of them vision": sizes["visual"],
                "compute": config.model.dtype,
                "devices": f"{len(devices)} x {devices[0].device_kind}",
                "mesh": " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
                + f": {rows} device rows, each with its own prompts",
                **distributed.describe(),
                "seed": config.seed,
            },
            "Stages": [_plan_of(run, stage) for stage in run.stages],
            f"Held-out questions ({config.evaluation.split})": [
                {
                    "set": name,
                    "questions": len(_questions(run, name)),
                    "blind guess": f"{run.blind[name]:.1%}" if name in run.blind else "",
                }
                for name in config.evaluation.sets
            ],
        }
    )
    if run.mesh.size > 1:
        run.display.table("Where parameters lie", sharding.described(run.mesh, run.parameters))
    for (name, split), lines in run.sets.skipped_rows.items():
        run.display.warn(f"{name} {split}: {len(lines)} rows skipped, the first: {lines[0]}")


def _plan_of(run: Run, stage: Stage) -> dict[str, Any]:
    group = f" x {run.config.rollout.group}" if objectives.OBJECTIVES[stage.objective].sampled else ""
    return {
        "stage": stage.name,
        "data": " + ".join(stage.data) + stage.curriculum.described(),
        "problems": sum(map(len, run.selected(stage))),
        "objective": stage.objective,
        "steps": stage.steps,
        "a step": f"{stage.prompts}{group}",
        "learning rate": f"{stage.learning_rate:g}",
        "frozen": "all but LoRA's factors" if run.lora else stage.freeze or "nothing",
    }


def _blind(run: Run) -> dict[str, float]:
    """The best accuracy without looking, for each held-out set with images."""
    if not run.config.evaluation.blind:
        return {}
    blind = {}
    for name in run.config.evaluation.sets:
        questions = _questions(run, name)
        if any(problem.images for problem in questions) and name in {n for s in run.stages for n in s.data}:
            blind[name] = blind_accuracy(run.sets.problems(name, "train"), questions)
    return blind


def _questions(run: Run, name: str) -> list[Problem]:
    problems = run.sets.problems(name, run.config.evaluation.split)
    return problems[: run.config.evaluation.questions or None]


def _accuracies(
    run: Run, title: str, split: str, questions: int, sampling: Sampling, stoppable: bool
) -> list[dict[str, Any]]:
    """Accuracy of every capability now, on the first `questions` of a split (0: all)."""
    results = []
    sets = {name: run.sets.problems(name, split)[: questions or None] for name in run.config.evaluation.sets}
    with run.display.progress(title, sum(map(len, sets.values()))) as progress:

        def advance(count: int) -> None:
            if stoppable:
                run.interruption.check(distributed.agree)
            progress(count)

        for name, problems in sets.items():
            result = heldout.evaluate(
                problems,
                engine=run.engine,
                builder=run.builder,
                reward=run.reward,
                sampling=sampling,
                seed=run.config.seed,
                batch=4 * run.config.rollout.slots,  # slots that become free find work
                progress=advance,
            )
            if not result["questions"]:
                raise InputError(f"no {split} question of '{name}' can be used: {run.builder.reasons()}")
            results.append({"capability": name, **result})
    return results


def evaluate(run: Run, label: str) -> None:
    """Held-out accuracy of every capability now; `label` is "base" or the name of the stage just done."""
    settings, started = run.config.evaluation, time.monotonic()
    results = _accuracies(run, f"evaluating ({label})", settings.split, settings.questions, run.greedy, True)
    records = [{"type": "evaluation", "step": run.step, "after": label, **result} for result in results]
    for record in records:
        run._write({**record, "seconds_all": time.monotonic() - started})
    run.evaluations += records
    run.position = dataclasses.replace(run.position, evaluated=True)
    run.display.evaluation(records)


def warm_up_validation(run: Run) -> None:
    """Compiles what `validate` samples with, so that it does not look like a late compilation."""
    settings = run.config.validation
    if not settings.every:
        return
    for name in run.config.evaluation.sets:
        problems, sizes = run.sets.problems(name, "validation")[: settings.questions or None], []
        for problem in problems:
            with contextlib.suppress(BadInput):  # `validate` counts it
                sizes.append(run.builder.measure(problem))
        if sizes:
            run.engine.warm_up(sizes, run.validating, 1, any(problem.images for problem in problems))
    if not run.exports_compiled:  # where parameters lie on several devices, an export runs small programs
        dtype = dtype_of(run.config.export.dtype, "config.export.dtype")
        for _ in huggingface.published_tensors(run.parameters, run.processor.config, dtype, run.lora):
            pass
        run.exports_compiled = True


def validate(run: Run, stage: str) -> float:
    """Mean accuracy over the capabilities on validation questions; the best so far is exported.

    A signal to stop waits for its end: the checkpoint of this step is to have the figure.
    """
    settings, started = run.config.validation, time.monotonic()
    results = _accuracies(run, f"validating ({stage})", "validation", settings.questions, run.validating, False)
    accuracy = statistics.fmean(result["accuracy"] for result in results)
    record = {
        "type": "validation",
        "step": run.step,
        "stage": stage,
        "accuracy": accuracy,
        **{result["capability"]: {k: v for k, v in result.items() if k != "by_kind"} for result in results},
        "seconds_all": time.monotonic() - started,
    }
    run._write(record)
    if run.best is None or accuracy > run.best:
        run.best = accuracy
        run.export("best")
    return accuracy


def finish(run: Run, status: str) -> dict[str, Any]:
    """Saves the checkpoint, summary.json and report.html; prints the closing table."""
    checkpoint = run.export("final")
    run.checkpoints.close()
    accuracy = metrics.accuracy_of(run.evaluations)
    if status != "finished":
        for values in accuracy.values():
            values.pop("final")
    last = run.evaluations[-len(run.config.evaluation.sets) :] if status == "finished" else []
    rollout_steps = [step for step in run._steps if objectives.OBJECTIVES[step["objective"]].sampled]
    skipped = {
        "rows": sum(map(len, run.sets.skipped_rows.values())),
        "images": run.builder.counts["images"],
        "prompts": run.builder.counts["prompts"],
        "updates": run.skipped_updates,
        **run.reward.counters(),
    }
    summary = {
        "status": status,
        "accuracy": accuracy,
        "blind": run.blind,
        "seconds": time.monotonic() - run.started,
        "step_seconds_median": _over(statistics.median, [step["seconds"] for step in run._steps]),
        "compilations_after_warmup": sum(step["compilations"] for step in run._steps),
        "logprob_difference_mean": _over(statistics.fmean, [step["logprob_difference_mean"] for step in rollout_steps]),
        "format_reward_final": _over(statistics.fmean, [record["format"] for record in last]),
        "steps": run.step,
        "best_validation": run.best,
        "parameters": run.parameter_count,
        "checkpoint": str(checkpoint),
        "skipped": skipped,
    }
    if not run.owner:
        return summary
    jsonl.write_json_atomic(run.workdir / "summary.json", summary)
    files = {"report": report.write_report(run.workdir), "metrics": run.workdir / "metrics.jsonl"}
    for line in explain_skipped(run.builder):
        run.display.warn(f"left out: {line}")
    run.display.final(summary, files)
    return summary


def _over(function, values: Sequence[float | None]) -> float | None:
    """Of the finite ones: a step whose update was skipped has none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    return float(function(values)) if values else None
