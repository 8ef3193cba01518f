"""What a run shows and leaves: its plan, the records of steps and evaluations, the summary and the report."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from capcur_jax import policy
from capcur_jax.data.prompts import explain_skipped
from capcur_jax.devices import distributed, sharding
from capcur_jax.evaluation import counterfactual as twins
from capcur_jax.evaluation import folders, keeper, kept, page
from capcur_jax.evaluation.blind import blind_accuracy
from capcur_jax.hub import download
from capcur_jax.learner import objectives, packing
from capcur_jax.learner.minibatches import Micro
from capcur_jax.records import jsonl, metrics
from capcur_jax.report import model_card
from capcur_jax.report import run as report
from capcur_jax.rollout.groups import Rollout
from capcur_jax.run import Run
from capcur_jax.schedule import Stage


def plan(run: Run, stages: Sequence[Stage]) -> dict[str, Any]:
    """Writes config and versions; prints stages, data, steps, parameters and devices. Returns what of it the summary
    says again: `parameters`, `blind` and `stages`."""
    config, parameters = run.config, run.trainer.parameters()
    if run.owner:
        jsonl.write_json_atomic(run.workdir / "config.json", config.to_dict())
        jsonl.write_json_atomic(run.workdir / "versions.json", metrics.versions())
    sizes = {path[0]: 0 for path, _ in nnx.to_flat_state(parameters)}
    for path, leaf in nnx.to_flat_state(parameters):
        sizes[path[0]] += leaf.size
    count, blind, asked = sum(sizes.values()), _blind(run), run.heldout.composition()
    planned = [_plan_of(run, stage) for stage in stages]
    if run.owner:
        jsonl.write_json_atomic(run.workdir / "questions.json", asked)
    devices, rows = jax.devices(), sharding.row_shards(run.mesh)
    run.display.plan(
        {
            "Run": {
                "work directory": str(run.workdir),
                "checkpoint": download.version(config.checkpoint, run.policy.source) or str(run.policy.source),
                "parameters": count,
                "of them vision": sizes["visual"],
                "compute": config.model.dtype,
                "devices": f"{len(devices)} x {devices[0].device_kind}",
                "mesh": " x ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
                + f": {rows} device row{'s, each with its own prompts' if rows > 1 else ''}",
                **run.decided,
                **distributed.describe(),
                "seed": config.seed,
            },
            "Stages": planned,
            "A prompt, as the model sees it": _prompt_of(run),
            f"Held-out questions ({config.evaluation.split})": [
                {
                    "set": name,
                    "questions": found["questions"],
                    "of": found["of"],
                    "blind guess": f"{blind[name]:.1%}" if name in blind else "",
                    "kinds and sources": "; ".join(filter(None, map(_shares, (found["kinds"], found["sources"])))),
                }
                for name, found in asked["evaluation"]["sets"].items()
            ],
        }
    )
    if run.mesh.size > 1:
        run.display.table("Where parameters lie", sharding.described(run.mesh, parameters))
    if config.evaluation.base_instruction != config.evaluation.instruction:
        run.display.warn(
            f"config.evaluation: base_instruction = {config.evaluation.base_instruction!r} asks the base otherwise "
            f"than trained models, instruction = {config.evaluation.instruction!r}: gains over it have that in them, "
            "too, and only boxed answers are right (docs/configs.md, The paper's presets)"
        )
    for (name, split), lines in run.sets.skipped_rows.items():
        run.display.warn(f"{name} {split}: {len(lines)} rows skipped, the first: {lines[0]}")
    for (name, split), rows in run.sets.repaired_rows.items():
        first = f"{rows[0].id}: {', '.join(rows[0].repaired)}"
        run.display.warn(f"{name} {split}: {len(rows)} rows put right, the first: {first} (`data check` shows them)")
    for stage in stages:
        for line in _fewer(run, stage):
            run.display.warn(line)
    return {"parameters": count, "blind": blind, "stages": planned}


def _prompt_of(run: Run) -> dict[str, str]:
    """The chat template and the instruction at work, on the first held-out question, for each way of asking."""
    question, builders = run.heldout.questions(run.config.evaluation.sets[0])[0], run.heldout.builders
    purposes: dict[str, list[str]] = {}
    for purpose, builder in builders.items():
        purposes.setdefault(json.dumps(builder.render(question), ensure_ascii=False), []).append(purpose)
    shown = {", ".join(who) if len(purposes) > 1 else "prompt": prompt for prompt, who in purposes.items()}
    if opened := run.policy.processor.opened.strip():
        shown["the template begins"] = f"{opened}: rewards count it as part of every response"
    return shown


def _shares(shares: dict[str, float], shown: int = 5) -> str:
    """The largest, for people."""
    said = [f"{name} {share:.0%}" for name, share in list(shares.items())[:shown]]
    return ", ".join([*said, *([f"{len(shares) - shown} more"] if len(shares) > shown else [])])


def _fewer(run: Run, stage: Stage) -> Iterator[str]:
    """Of sets of which the stage's selection by pass rate leaves fewer problems than the stage was to draw."""
    if not stage.curriculum.by_difficulty:
        return
    for name, left in zip(stage.data, run.sets.selected(stage.data, stage.curriculum), strict=True):
        of = len(run.sets.problems(name, "train"))
        if len(left) < (wanted := min(of, stage.curriculum.rows)):
            yield (
                f"stage {stage.name}: selection by pass rate leaves {len(left):,} of {of:,} problems of {name}, fewer "
                f"than curriculum.rows = {wanted:,}: what is left comes more often"
            )


def _plan_of(run: Run, stage: Stage) -> dict[str, Any]:
    group = f" x {run.config.rollout.group}" if objectives.of_stage(stage).sampled else ""
    return {
        "stage": stage.name,
        "data": " + ".join(stage.data) + stage.curriculum.described(),
        "problems": sum(map(len, run.sets.selected(stage.data, stage.curriculum))),
        "objective": stage.objective,
        "steps": f"{stage.steps:,}, or {rule}" if (rule := stage.switch.described()) else stage.steps,
        "a step": f"{stage.prompts}{group}",
        "learning rate": f"{stage.learning_rate:g}",
        "frozen": "all but LoRA's factors" if run.policy.lora else stage.freeze or "nothing",
    }


def _blind(run: Run) -> dict[str, float]:
    """The best accuracy of guesses from the training texts, without the image, for each set that is evaluated. A set
    without training rows of its own is guessed from the stages'."""
    if not run.config.evaluation.blind:
        return {}
    blind = {}
    for name in run.config.evaluation.sets:
        trained = {other for stage in run.stages for other in stage.data}
        rows = run.sets.pool(sorted(trained) if run.sets.missing(name, "train") else [name], "train")
        if rows := [problem for problem in rows if problem.answer]:  # not what an SFT stage imitates
            blind[name] = blind_accuracy(rows, run.heldout.questions(name))
    return blind


# ---------------------------------------------------------------------- records


def step_record(
    run: Run,
    stage: Stage,
    minibatches: Sequence[Sequence[Micro]],
    rollout: Rollout | None,
    rate: float,
    sync: dict[str, float],
) -> dict[str, Any]:
    """What is known of the step that `run.progress` counts last, before its update is done. `sync`: seconds of the
    weights' way to the engine by phase."""
    if rollout and rollout.refused:
        run.display.warn(
            f"step {run.progress.step}: the rollout engine refused {len(rollout.refused)} prompts, others took their "
            f"places (the first: {rollout.refused[0]}): {run.engine.health().refusal}"
        )
    micros = [micro for mini in minibatches for micro in mini]
    counts = distributed.exchange(sum(micro.slots() for micro in micros)).sum(0)
    return {
        "type": "step",
        "step": run.progress.step,
        "stage": stage.name,
        "stage_step": run.progress.stage_step,
        "objective": stage.objective,
        "learning_rate": rate,
        **(rollout.metrics() | _engine_record(run) if rollout else {}),
        **packing.shares(counts),
        "tokens": int(counts[0]),
        "micro_batches": len(micros),
        **{f"seconds_sync_{phase}": seconds for phase, seconds in sync.items()},
    }


def _engine_record(run: Run) -> dict[str, float]:
    """What the engine says of itself; its counters are of this process since its start."""
    counted = {f"rollout_{name}": count for name, count in run.engine.counters().items()}
    return {"weight_version": run.progress.version, **counted}


def evaluate(run: Run, label: str) -> None:
    """Held-out accuracy of every capability now; `label` is "base" or the name of the stage just done."""
    started = time.monotonic()
    with run.interruption.at_once():
        if label == "base" and run.config.evaluation.base_results:
            results = kept.once(run.config, run.sets, run.workdir, lambda: run.heldout.evaluate(label))
        else:
            results = run.heldout.evaluate(label)
    records = [{"type": "evaluation", "step": run.progress.step, "after": label, **result} for result in results]
    run.recorder.evaluation(records, time.monotonic() - started)


def counterfactual(run: Run) -> None:
    """How many of the final weights' errors the figures' facts as text would mend; config.evaluation.counterfactual.

    Written to WORKDIR/evaluation/final, for the report and for `errors`; nothing where no set has such facts."""
    settings, builder = run.config.evaluation, run.heldout.builders["evaluation"]
    if not settings.counterfactual:
        return
    found, started = {}, time.monotonic()
    with run.interruption.at_once():
        for name in settings.sets:
            pairs, left_out = twins.twins(run.heldout.questions(name))
            if not pairs:
                continue
            pairs = pairs[: settings.counterfactual]  # the questions come in the order of their hashes
            count = len(twins.ways_of(pairs)) * len(pairs)
            with run.display.progress(f"counterfactual ({name})", count) as progress:
                result = twins.ask(
                    pairs,
                    engine=run.engine,
                    builder=builder,
                    reward=run.reward,
                    sampling=run.sampling,
                    seed=run.config.seed,
                    batch=max(1, policy.batch(run.config) // twins.SAMPLES),
                    progress=progress,
                )
            found[name] = {**result, "left_out": left_out | result["left_out"]}
    if found and run.owner:
        kept = {"temperature": run.sampling.temperature, "seconds": time.monotonic() - started, "sets": found}
        jsonl.write_json_atomic(run.workdir / folders.FINAL / twins.FILE, {**kept, "shown": twins.shown(kept)})


def validate(run: Run, stage: str) -> float:
    """Mean accuracy over the capabilities on validation questions."""
    started = time.monotonic()
    results = run.heldout.validate(stage)
    accuracy = statistics.fmean(result["accuracy"] for result in results)
    record = {
        "type": "validation",
        "step": run.progress.step,
        "stage": stage,
        "accuracy": accuracy,
        **{result["capability"]: {k: v for k, v in result.items() if k != "by_kind"} for result in results},
        "seconds_all": time.monotonic() - started,
    }
    run.recorder.write(record)
    return accuracy


def drop_validations(run: Run, complete: float = math.inf) -> None:
    """Keeps as many validations as checkpoints, and that of the best one; `complete` as keeper.drop_validations."""
    if run.owner:
        keep = run.config.checkpointing.keep
        keeper.drop_validations(run.workdir / "evaluation", run.recorder.validations, keep, complete)


# ---------------------------------------------------------------------- the end


def finish(run: Run, status: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Saves the checkpoint, summary.json and report.html; prints the closing table. `facts`: what `plan` returned.

    A run that ended early without having learned anything exports nothing: its parameters are those of the base.
    """
    run.recorder.complete()  # where the run failed, a step may be pending
    learned = status == "finished" or run.progress.version > run.recorder.skipped
    checkpoint = run.export("final") if learned else None
    run.checkpoints.close()
    drop_validations(run)
    steps, evaluations = run.recorder.steps, run.recorder.evaluations
    shown = {key: metrics.accuracy_of(evaluations, key) for key in ("accuracy", "accuracy_answered", "left_out")}
    if status != "finished":
        for values in (values for found in shown.values() for values in found.values()):
            values.pop("final", None)
    last = evaluations[-len(run.config.evaluation.sets) :] if status == "finished" else []
    builder = run.policy.builder
    skipped = {
        "rows": sum(map(len, run.sets.skipped_rows.values())),
        "images": builder.counts["images"],
        "prompts": builder.counts["prompts"],
        "refused_prompts": int(sum(step.get("refused_prompts", 0) for step in steps)),
        "updates": run.recorder.skipped,
        **run.reward.counters(),
    }
    summary = {
        "status": status,
        **shown,
        "instruction": {purpose: builder.placement for purpose, builder in run.heldout.builders.items()},
        "blind": facts["blind"],
        "seconds": run.seconds(),
        "step_seconds_median": _over(statistics.median, [step["seconds"] for step in steps]),
        "compilations_after_warmup": sum(step["compilations"] for step in steps),
        "logprob_difference_mean": _over(statistics.fmean, [step.get("logprob_difference_mean") for step in steps]),
        "format_reward_final": _over(statistics.fmean, [record["format"] for record in last]),
        "steps": run.progress.step,
        "devices": run.mesh.size,
        "best_validation": run.progress.best,
        "parameters": facts["parameters"],
        "stages": facts["stages"],
        "checkpoint": str(checkpoint) if checkpoint else None,
        "skipped": skipped,
        "put_right": {
            "rows": sum(map(len, run.sets.repaired_rows.values())),
            "flawed images": run.policy.images.counters()["flawed"],
        },
    }
    if not run.owner:
        return summary
    jsonl.write_json_atomic(run.workdir / "summary.json", summary)
    base = download.version(run.config.checkpoint, run.policy.source)
    model_card.write(run.workdir, run.policy.source, base)
    page_of_run = report.write_report(run.workdir).name  # all paths are told as the user gave --workdir
    files = {"report": run.workdir / page_of_run, "metrics": run.workdir / "metrics.jsonl"}
    if (run.workdir / folders.FINAL / folders.SCORES).is_file():
        files["answers"] = page.write(run.workdir / folders.FINAL)
    for line in explain_skipped(builder):
        run.display.warn(f"left out: {line}")
    run.display.final(summary, files)
    return summary


def _over(function, values: Sequence[float | None]) -> float | None:
    """Of the finite ones: a step whose update was skipped has none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    return float(function(values)) if values else None
