"""The training loop, from top to bottom: base evaluation, then each stage (warm-up, steps, export, evaluation), result.

Steps are synchronous: rollouts come from the parameters that the update then changes, so old log-probs are the
policy's own where a rollout batch makes one update. The host runs ahead of the devices by one step's update: its
metrics are fetched when the next step has drawn its rollouts.

What a run goes on from after a stop is the last checkpoint in its work directory: parameters, optimizer state,
reference policy, the number of rollout batches consumed, and how long its record files were. Samples and the order of
data follow from the seed and from numbers in the checkpoint: with the local engine the continuation is the
unbroken run, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from capcur_jax import policy, results, schedule
from capcur_jax.checkpoints.checkpointing import record_sizes
from capcur_jax.data import loader
from capcur_jax.data.loader import Example
from capcur_jax.data.problem import Problem
from capcur_jax.devices import distributed
from capcur_jax.errors import InputError
from capcur_jax.interruption import Interrupted, Interruption
from capcur_jax.learner import objectives
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.minibatches import Micro, minibatches, sampled_item, target_item
from capcur_jax.learner.packing import Item
from capcur_jax.models.batching import PromptSize
from capcur_jax.records.display import Display
from capcur_jax.records.metrics import PhaseTimer
from capcur_jax.records.profile import Profile
from capcur_jax.rollout.collector import Collector
from capcur_jax.rollout.groups import Rollout
from capcur_jax.run import Run
from capcur_jax.schedule import Stage

IDLE_STEPS = 5  # a step without a finite update is an accident, five in a row are none
Usable = tuple[list[list[Problem]], list[PromptSize]]  # what loader.usable found of a stage


def train(
    config: ConfigDict,
    workdir: Path,
    quiet: bool = False,
    started: float | None = None,
    profile: str = "",
    accept: bool = False,
) -> dict[str, Any]:
    """Runs the schedule, or what is left of it, and returns the summary.

    Args:
        started: time.monotonic() when the process began, if known.
        profile: global steps to trace, such as "10-12"; "": none.
        accept: whether a run that goes on may read other data, weights, rewards or packages than when it began.

    Raises InputError for what the user has to mend. Whatever ends a run of one process, what it learned is exported.
    """
    stages = schedule.stages(config)
    quiet = quiet or not distributed.is_owner()
    display = Display(quiet=quiet)
    display.note(f"reading data and checkpoint; what the run leaves comes into {workdir}")
    tracer = Profile(workdir, profile, display.warn)
    alone = distributed.process_count() == 1
    with (
        display,
        Interruption(alone) as interruption,
        Run(config, workdir, stages, display, interruption, started, accept) as run,
    ):
        with interruption.at_once():
            measured = {stage.name: usable(run, stage) for stage in stages if stage.epochs}
        stages = [with_steps(stage, measured) for stage in stages]
        display.whole_run(sum(stage.steps for stage in stages), run.progress.step)
        facts = results.plan(run, stages)
        at = run.progress
        try:
            if config.validation.every:  # whose best is exported between steps
                run.warm_up_export()
            if run.restored is None:
                results.evaluate(run, "base")
            for number, stage in enumerate(stages[at.stage :], at.stage):
                stage = schedule.with_what_is_left(stages, number, run.progress.before(number))
                train_stage(run, stage, number, measured.pop(stage.name, None), tracer)
                if config.export.each_stage and number + 1 < len(stages):
                    run.export(f"{number + 1}-{stage.name}")
                results.evaluate(run, stage.name)
            results.counterfactual(run)
            status = "finished"
        except Interrupted as signal:
            display.warn(f"{signal}: stopping here; the same command with --workdir={workdir} goes on")
            status = "interrupted"
        except Exception:
            # An export needs all processes, and the others end when this one does. Before its checkpoint is restored a
            # run has learned nothing: what it exported before stays.
            if alone and run.may_finish:
                try:
                    results.finish(run, "failed", facts)
                except Exception as second:  # what went wrong first is what the user has to know
                    display.warn(f"what was learned since the last checkpoint could not be saved: {second}")
            raise
        finally:
            tracer.close()
        summary = results.finish(run, status, facts)
        distributed.barrier("end")  # a process that leaves earlier would take the others with it
        return summary


def train_stage(run: Run, stage: Stage, number: int, measured: Usable | None, tracer: Profile) -> None:
    """One stage: its own reference policy, its own optimizer state, its own order of data."""
    config, trainer, recorder, kind = run.config, run.trainer, run.recorder, policy.engine_kind(run.config)
    with open_stage(run, stage, number, measured) as (layout, examples, collector, steps):
        recorder.begin_stage()
        for step in steps:
            tracer.before(run.progress.step + 1)
            timer, last = PhaseTimer(), step + 1 == stage.steps
            with stopping_here(run):
                items, rollout = draw(run, stage, timer, examples, collector, last)
            recorder.complete()  # the step before: the devices have done with it by now
            with timer("pack"):
                minis = minibatches(items, layout, config)
            end_if_idle(run, minis, layout, IDLE_STEPS)
            dispatched, rates = time.perf_counter(), learning_rates(stage, step, layout.updates)
            with timer("update"):
                run.turns.begin_update()
                updates = trainer.step(minis, layout.old, rates)
                if not kind.in_process:  # what follows reads the parameters: let this phase be its own
                    jax.block_until_ready(updates)
            run.progress = run.progress.after_step(layout.updates, rollout.batches if rollout else 1)
            with timer("sync"):
                sampled_next = rollout is not None or last or due(config.validation.every, step)
                sync = run.turns.hand_over(run.progress.version) if sampled_next else {}
            record = results.step_record(run, stage, minis, rollout, rates[-1], sync)
            recorder.put(record, updates, run.progress.skipped, timer, dispatched)
            if rollout and step % config.log.rollouts_every == 0:
                where = {"step": run.progress.step, "stage": stage.name}
                run.show_rollouts([where | line for line in rollout.shown(config.log.rollout_prompts, run.workdir)])
            tracer.after(run.progress.step)
            if end_of_step(run, stage, step, last):
                end_if_idle(run, minis, layout, 1)
                break
    recorder.complete()


class OpenStage(NamedTuple):
    """What a stage's steps are made with."""

    layout: Layout
    examples: Iterator[list[Example]]  # those of each step, of this process
    collector: Collector
    steps: range  # that are left


@contextlib.contextmanager
def open_stage(run: Run, stage: Stage, number: int, measured: Usable | None) -> Iterator[OpenStage]:
    """The stage's data, its state - a fresh one around the present parameters, or that of the last checkpoint - and its
    compiled programs; the engine has the weights. Closes the collector."""
    config, trainer = run.config, run.trainer
    run.display.stage(stage.name, stage.steps)
    with run.interruption.at_once():
        sets, sizes = measured or usable(run, stage)
    images = any(size.images for size in sizes)
    layout = run.layout(stage, images, sizes)
    run.turns.begin_stage()
    learner, name = run.learner(stage), f"{number}-{stage.name}"
    if run.restored is not None and number == run.progress.stage:
        trainer.restore(learner, config, layout.reference, run.checkpoints, name, run.restored)
        if not run.turns.shared:  # else `hand_over` follows
            run.turns.hand_over(run.progress.version)
    else:
        trainer.begin(learner, config, layout.reference)
        run.checkpoints.save_reference(name, trainer.stage_start(number))
        run.progress = run.progress.begin_stage(number, run.recorder.skipped)
        save(run, wait=True)
    steps = range(run.progress.stage_step, stage.steps)
    if over(run, stage):  # it was stopped between its last step and the next stage
        steps = range(0)
    if steps:
        with run.interruption.at_once():
            warm_up(run, stage, layout, sizes, images)
    if run.turns.shared:
        run.turns.hand_over(run.progress.version)
    order = stage.curriculum.arrange(sets, config.seed + 1000 * number, stage.prompts)
    maker = loader.Maker(
        order, run.policy.builder, target(run, stage), stage.prompts, layout.updates, f"stage {stage.name}"
    )
    threads = max(2, config.data.workers)  # each waits for a worker
    examples = loader.batches(maker, maker.local, start=run.progress.batches, threads=threads)
    with Collector(
        run.engine,
        run.sampling,
        run.grading,
        examples,
        local=maker.local,
        images=images,
        updates=layout.updates,
        capabilities=run.sets.capabilities(stage.data),
        settings=config.rollout,
        seed=config.seed,
    ) as collector:
        yield OpenStage(layout, examples, collector, steps)


def draw(
    run: Run, stage: Stage, timer: PhaseTimer, examples: Iterator[list[Example]], collector: Collector, last: bool
) -> tuple[list[Item], Rollout | None]:
    """What the step learns from: sampled groups and their rollout, or targets to imitate."""
    if not objectives.of_stage(stage).sampled:
        with timer("data"):
            return [target_item(example.prompt, example.target) for example in next(examples)], None
    step, masked = run.progress.step, run.config.objective.mask_truncated
    rollout = collector.step(timer, step, run.progress.version)
    if not last:
        collector.ahead(timer, step + 1)
    return [sampled_item(g.example.prompt, g.samples, g.advantages, masked) for g in rollout.groups], rollout


def learning_rates(stage: Stage, step: int, updates: int) -> list[float]:
    """Of each update of the stage's step number `step`."""
    return [stage.learning_rate_at(step * updates + i, stage.steps * updates) for i in range(updates)]


def due(every: int, step: int) -> bool:
    return bool(every) and (step + 1) % every == 0


def over(run: Run, stage: Stage) -> bool:
    """Whether the stage's rule ends it now. The records decide, which a run that goes on has up to its checkpoint."""
    if stage.switch.rule == "none":
        return False
    run.recorder.complete()
    steps = [_share(record.get("accuracy")) for record in run.recorder.steps if record["stage"] == stage.name]
    checks = [
        statistics.fmean(_share(record[name]["accuracy"]) for name in stage.data if name in record)
        for record in run.recorder.validations
        if record["stage"] == stage.name
    ]
    return distributed.agree(stage.switch.over(steps, checks))


def _share(value: float | None) -> float:
    """A record's; what is not finite in memory is None in a file, and no share."""
    return -math.inf if value is None or not math.isfinite(value) else value


def end_of_step(run: Run, stage: Stage, step: int, last: bool) -> bool:
    """What is due between two steps: a validation, whose best is exported, and a checkpoint. Returns whether the stage
    ends here: it was its last step, or its rule says so."""
    metric = None
    if due(run.config.validation.every, step):
        run.recorder.complete()
        with run.recorder.between("seconds_validation"):
            accuracy = results.validate(run, stage.name)
            metric = None if math.isnan(accuracy) else accuracy  # a reward on another scale gives none
            if metric is not None and (run.progress.best is None or metric > run.progress.best):
                run.progress = dataclasses.replace(run.progress, best=metric)
                run.export("best")
    if not last and over(run, stage):
        last, left = True, stage.steps - step - 1
        rule = {"rule": stage.switch.rule, "stage_step": step + 1, "steps_left": left}
        run.recorder.write({"type": "switch", "step": run.progress.step, "stage": stage.name, **rule})
        run.display.note(
            f"stage {stage.name} ends after {step + 1:,} steps ({stage.switch.described()}); the next one gets the "
            f"{left:,} that are left"
        )
    if metric is not None or due(run.config.checkpointing.every, step) or last:
        run.recorder.complete()
        with run.recorder.between("seconds_checkpoint"):
            save(run, metric)
            results.drop_validations(run, complete=run.progress.step)  # this checkpoint is still being written
    return last


def end_if_idle(run: Run, minis: Sequence[Sequence[Micro]], layout: Layout, most: int) -> None:
    """Raises InputError where the last `most` steps or more left every update out: the stage learns nothing."""
    idle = run.recorder.idle
    if idle >= most:
        run.turns.begin_update()
        raise InputError(
            f"every update of the last {idle} steps was left out, as its loss or gradient was not finite; "
            f"{run.trainer.not_finite(minis, layout.old)}. Is the checkpoint one for config.model.dtype, are rewards "
            "and learning rate moderate? docs/training.md says more (Batches)"
        )


def save(run: Run, metric: float | None = None, wait: bool = False) -> None:
    """A checkpoint from which the run goes on here; written in the background."""
    progress = dataclasses.replace(run.progress, seconds=run.seconds())
    sizes = record_sizes(run.workdir)
    run.checkpoints.save_run(progress, run.trainer.state, sizes, metric=metric, wait=wait)


@contextlib.contextmanager
def stopping_here(run: Run) -> Iterator[None]:
    """Raises Interrupted after a signal, with the state on the disk; in a run of one process whenever it comes."""
    try:
        run.stop_if_asked()
        with run.interruption.at_once():
            yield
    except Interrupted:
        run.recorder.complete()
        if not run.checkpoints.holds(run.progress):
            save(run, wait=True)
        raise


# ---------------------------------------------------------------------- data


def target(run: Run, stage: Stage) -> loader.Target:
    if objectives.of_stage(stage).sampled:
        return loader.no_target
    return loader.targets(run.policy.processor, run.config.rollout.max_new_tokens)


def usable(run: Run, stage: Stage) -> Usable:
    """The stage's problems that its curriculum selects and that fit; see loader.usable."""
    selected = run.sets.selected(stage.data, stage.curriculum)
    return loader.usable(selected, run.policy.builder, target(run, stage), f"stage {stage.name}")


def with_steps(stage: Stage, measured: dict[str, Usable]) -> Stage:
    """The stage with its epochs counted in steps; prompts that do not fit are left out."""
    if not stage.epochs:
        return stage
    counts = [len(problems) for problems in measured[stage.name][0]]
    steps = stage.curriculum.steps(counts, stage.prompts, stage.epochs, f"config.stages.{stage.name}")
    return dataclasses.replace(stage, steps=steps)


# ---------------------------------------------------------------------- warm-up


def warm_up(run: Run, stage: Stage, layout: Layout, sizes: Sequence[PromptSize], images: bool) -> None:
    """Compiles every program that the stage's batches can need, whichever prompts and responses meet in one."""
    config, trainer, state = run.config, run.trainer, run.trainer.state
    learner = trainer.learner
    passes = list(layout.blanks(passes=True)) if layout.scores else []
    gradients = list(layout.blanks(passes=False))
    policies = [state.trained] if layout.old else []
    if trainer.reference is not None:
        policies.append(trainer.reference_home.work(trainer.reference))
    with run.display.progress(f"compiling ({stage.name})", len(gradients) + len(passes) + 1) as done:
        if objectives.of_stage(stage).sampled:
            run.engine.warm_up(sizes, run.sampling, config.rollout.group, images)
            run.grading.warm_up(stage.prompts // jax.process_count(), config.rollout.group)
        if config.validation.every:
            run.heldout.warm_up()
        done()
        trainer.sums = learner.zeros(state.trained, trainer.frozen, gradients[0])
        for batch in passes:
            for scoring in policies:
                learner.score.compile(scoring, trainer.frozen, batch)
            run.stop_if_asked()
            done()
        for batch in gradients:
            learner.accumulate.compile(state.trained, trainer.frozen, trainer.sums, batch)
            run.stop_if_asked()
            done()
        learner.apply.compile(trainer.at_work(), trainer.sums, np.float32(0))
