"""The training loop, from top to bottom: base evaluation, then each stage (warm-up, steps, export, evaluation), result.

Steps are synchronous: rollouts come from the parameters that the update then changes, so old log-probs are the
policy's own where a rollout batch makes one update. The host runs ahead of the devices by one step's update: its
metrics are fetched when the next step has drawn its rollouts.

What a run goes on from after a stop is the last checkpoint in its work directory: parameters, optimizer state,
reference policy, the number of rollout batches consumed, and how long its record files were. Samples and the order of
data follow from the seed and from numbers in the checkpoint: the continuation is the unbroken run, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from capcur_jax import results, schedule
from capcur_jax.checkpointing import Position
from capcur_jax.data import loader
from capcur_jax.data.loader import Example
from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import target_tokens
from capcur_jax.devices import distributed
from capcur_jax.errors import InputError
from capcur_jax.interruption import Interrupted, Interruption
from capcur_jax.learner import objectives, packing
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.minibatches import minibatches, sampled_item, target_item
from capcur_jax.learner.trainer import Trainer, combined
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import BadInput
from capcur_jax.records import metrics
from capcur_jax.records.display import Display
from capcur_jax.records.profile import Profile
from capcur_jax.rollout.collector import Drawer
from capcur_jax.rollout.groups import Rollout
from capcur_jax.run import Run
from capcur_jax.schedule import Stage


def train(
    config: ConfigDict, workdir: Path, quiet: bool = False, started: float | None = None, profile: str = ""
) -> dict[str, Any]:
    """Runs the schedule, or what is left of it, and returns the summary.

    Args:
        started: time.monotonic() when the process began, if known.
        profile: global steps to trace, such as "10-12"; "": none.

    Raises InputError for what the user has to mend. Whatever ends the run, what was learned so far is saved.
    """
    stages = schedule.stages(config)
    quiet = quiet or not distributed.is_owner()
    display = Display(quiet=quiet)
    tracer = Profile(workdir, profile, display.warn)
    with display, Interruption() as interruption, Run(config, workdir, stages, display, interruption, started) as run:
        run.stages = stages = [with_steps(run, stage) for stage in run.stages]
        display.whole_run(sum(stage.steps for stage in stages))
        results.plan(run)
        at, late = run.position, Late(run)
        try:
            if not at.evaluated:
                results.evaluate(run, "base")
            for number, stage in enumerate(stages[at.stage :], at.stage):
                train_stage(run, stage, number, tracer, late)
                if config.export.each_stage and number + 1 < len(stages):
                    run.export(f"{number + 1}-{stage.name}")
                results.evaluate(run, stage.name)
            status = "finished"
        except Interrupted as signal:
            display.warn(f"{signal}: stopping here; the same command with --workdir={workdir} goes on")
            status = "interrupted"
        except Exception:
            if distributed.process_count() == 1:  # an export needs all processes; the others end when this one does
                try:
                    results.finish(run, "failed")
                except Exception as second:  # what went wrong first is what the user has to know
                    display.warn(f"what was learned since the last checkpoint could not be saved: {second}")
            raise
        finally:
            tracer.close()
        summary = results.finish(run, status)
        distributed.barrier("end")  # a process that leaves earlier would take the others with it
        return summary


def train_stage(run: Run, stage: Stage, number: int, tracer: Profile, late: Late) -> None:
    """One stage: its own reference policy, its own optimizer state, its own order of data."""
    config = run.config
    run.display.stage(stage.name, stage.steps)
    sets, sizes = run.measured.pop(stage.name, None) or usable(run, stage)
    images = any(size.images for size in sizes)
    layout = Layout.of(stage, config, run.buckets, run.processor, run.mesh, images)
    run.begin_stage()
    trainer = run.trainer(stage, number)
    done = run.position.stage_step >= stage.steps  # stopped between the stage's last step and the next stage
    if not done:
        warm_up(run, stage, trainer, layout, sizes, images)
    if run.turns:
        run.hand_over(trainer)
    if done:
        run.position = Position(stage=number + 1, evaluated=True)
        return
    order = stage.curriculum.arrange(sets, config.seed + 1000 * number, stage.prompts)
    maker = Maker(run, stage, order, layout.updates)
    threads = max(2, config.data.workers)  # each waits for a worker
    batches = loader.batches(maker, maker.local, start=run.position.batches, threads=threads)
    rates = [
        [stage.learning_rate_at(step * layout.updates + i, stage.steps * layout.updates) for i in range(layout.updates)]
        for step in range(stage.steps)
    ]
    drawer = Drawer(run, batches, maker.local, images, layout.updates)
    late.begin()
    with drawer:
        for step in range(run.position.stage_step, stage.steps):
            try:
                run.interruption.check(distributed.agree)
            except Interrupted:
                late.write()
                run.save_and_wait(trainer)
                raise
            tracer.before(run.step + 1)
            timer, rollout = metrics.PhaseTimer(), None
            last = step + 1 == stage.steps
            validated = bool(config.validation.every) and (step + 1) % config.validation.every == 0
            if objectives.OBJECTIVES[stage.objective].sampled:
                rollout = drawer.step(timer, run.capabilities(stage))
                if not last:
                    drawer.ahead(timer)
                items = [
                    sampled_item(g.example.prompt, g.samples, g.advantages, config.objective.mask_truncated)
                    for g in rollout.groups
                ]
            else:
                with timer("data"):
                    items = [target_item(example.prompt, example.target) for example in next(batches)]
                run.consumed_batch()
            late.write(timer)  # of the step before: the devices have done with it by now
            with timer("pack"):
                batched = minibatches(items, layout, config)
            started = time.perf_counter()
            with timer("update"):
                run.begin_update(trainer)
                updates = trainer.step(batched, layout.old, rates[step])
                if config.rollout.engine != "local":  # what follows reads the parameters: let this phase be its own
                    jax.block_until_ready(updates)
            with timer("sync"):
                phases = run.publish(
                    trainer, layout.updates, objectives.OBJECTIVES[stage.objective].sampled or last or validated
                )
            run.step += 1
            record = record_of(run, stage, step, batched, rollout, rates[step][-1])
            record |= {f"seconds_sync_{phase}": seconds for phase, seconds in phases.items()}
            late.put(record, updates, timer, started)
            if rollout and step % config.log.rollouts_every == 0:
                for line in rollout.shown(config.log.rollout_prompts, run.workdir):
                    run.rollouts.write({"step": run.step, "stage": stage.name, **line})
            tracer.after(run.step)
            run.position = dataclasses.replace(run.position, stage_step=step + 1)
            metric = None
            if validated:
                late.write()
                with late.extra("seconds_validation"):
                    metric = results.validate(run, stage.name)
            if metric is not None or (step + 1) % config.checkpointing.every == 0 or last:
                late.write()
                with late.extra("seconds_checkpoint"):
                    run.save(trainer, metric)
    late.write()
    run.position = Position(stage=number + 1, evaluated=True)


# ---------------------------------------------------------------------- data


def target_of(run: Run, stage: Stage, problem: Problem):
    """The tokens to imitate; None where nothing is imitated. Raises BadInput."""
    if objectives.OBJECTIVES[stage.objective].sampled:
        return None
    return target_tokens(run.processor, problem, run.config.rollout.max_new_tokens)


def usable(run: Run, stage: Stage) -> tuple[list[list[Problem]], list[PromptSize]]:
    """The problems of each of the stage's sets that its curriculum selects and that fit, and the sizes of all their
    prompts; no pixel is decoded. What does not fit is counted."""
    sets, sizes = [], []
    for selected in run.selected(stage):
        problems = []
        for problem in selected:
            try:
                target_of(run, stage, problem)
                sizes.append(run.builder.measure(problem))
                problems.append(problem)
            except BadInput as error:
                run.builder.skip(problem, error)
        sets.append(problems)
    if not sizes:
        raise InputError(f"stage {stage.name}: no problem can be used: {run.builder.reasons()}")
    return sets, sizes


def with_steps(run: Run, stage: Stage) -> Stage:
    """The stage with what its epochs come to: prompts that do not fit are no part of an epoch."""
    if not stage.epochs:
        return stage
    run.measured[stage.name] = usable(run, stage)  # every prompt was tokenised: once is enough
    counts = [len(problems) for problems in run.measured[stage.name][0]]
    steps = stage.curriculum.steps(counts, stage.prompts, stage.epochs, f"config.stages.{stage.name}")
    return dataclasses.replace(stage, steps=steps)


class Maker:
    """Example number i of this process, in the data threads: a function of the number alone, so that a run goes on from
    a number, and any number of processes see the same problems in the same steps.

    A problem whose image turns out to be broken is counted, and the one that comes a step later takes its place: in a
    curriculum, one that is about as hard. Where a fixed order has the same one there, its neighbours do.
    """

    def __init__(self, run: Run, stage: Stage, order: Any, updates: int):
        self._run, self._stage, self._order, self._updates = run, stage, order, updates
        self._process, self._processes = jax.process_index(), jax.process_count()
        self.local = stage.prompts // self._processes  # examples of a batch that are this process's
        # Not the builder's: what another stage could not use has no say here, where a resumed run may begin.
        self._unusable: set[Problem] = set()

    def number(self, index: int) -> int:
        """Where this process's example `index` stands in the order: of each update's prompts it has its share."""
        batch, at = divmod(index, self.local)
        share = self.local // self._updates
        update, within = divmod(at, share)
        return batch * self._stage.prompts + (update * self._processes + self._process) * share + within

    def __call__(self, index: int) -> Example:
        run, number = self._run, self.number(index)
        for attempt in range(1000):
            problem = self._order[number + attempt * self._stage.prompts + attempt // 2]
            if problem in self._unusable:
                continue
            try:
                return Example(problem, run.builder.build(problem), target_of(run, self._stage, problem))
            except BadInput as error:
                self._unusable.add(problem)
                run.builder.skip(problem, error)
        raise InputError(f"stage {self._stage.name}: no problem can be used: {run.builder.reasons()}")


# ---------------------------------------------------------------------- warm-up


def warm_up(
    run: Run, stage: Stage, trainer: Trainer, layout: Layout, sizes: Sequence[PromptSize], images: bool
) -> None:
    """Compiles every program that the stage's batches can need, whichever prompts and responses meet in one."""
    config, learner, state = run.config, trainer.learner, trainer.state
    passes = list(layout.blanks(sizes, passes=True)) if layout.scores else []
    gradients = list(layout.blanks(sizes, passes=False))
    policies = [state.trained] if layout.old else []
    if trainer.reference is not None:
        policies.append(trainer.reference_on_devices())
    with run.display.progress(f"compiling ({stage.name})", len(gradients) + len(passes) + 1) as done:
        if objectives.OBJECTIVES[stage.objective].sampled:
            run.engine.warm_up(sizes, run.sampling, config.rollout.group, images)
            run.warm_up_advantages(stage.prompts // jax.process_count())
        results.warm_up_validation(run)
        done()
        trainer.sums = learner.zeros(state.trained, trainer.frozen, gradients[0])
        for batch in passes:
            for policy in policies:
                learner.score.compile(policy, trainer.frozen, batch)
            run.interruption.check(distributed.agree)
            done()
        for batch in gradients:
            learner.accumulate.compile(state.trained, trainer.frozen, trainer.sums, batch)
            run.interruption.check(distributed.agree)
            done()
        learner.apply.compile(trainer.on_devices(state), trainer.sums, np.float32(0))


# ---------------------------------------------------------------------- records


def record_of(
    run: Run, stage: Stage, step: int, minibatches: Sequence, rollout: Rollout | None, rate: float
) -> dict[str, Any]:
    """What is known of a step before its update is done."""
    batches = [batch for mini in minibatches for batch in mini]
    counts = distributed.exchange(packing.slots(batches)).sum(0)
    return {
        "type": "step",
        "step": run.step,
        "stage": stage.name,
        "stage_step": step + 1,
        "objective": stage.objective,
        "learning_rate": rate,
        **(rollout.metrics() | sampler_of(run) if rollout else {}),
        **packing.shares(counts),
        "tokens": int(counts[0]),
        "micro_batches": len(batches),
    }


def sampler_of(run: Run) -> dict[str, float]:
    """What the engine says of itself; its counters are of this process since its start."""
    counted = {f"rollout_{name}": count for name, count in run.engine.counters().items()}
    return {"weight_version": run.version, **counted}


class Late:
    """Completes and writes the record of a step when the next one has been drawn: nothing waits for the devices.

    A thread notes when the update was done, so that the seconds of a phase are its own although the next step's host
    work ran beside it.
    """

    def __init__(self, run: Run):
        self._run, self._pending = run, None
        self._extra: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """A stage begins to step: what came before is no part of its first step."""
        self._compiled, self._ended = self._run.counter.count, time.perf_counter()

    def put(self, record: dict, results: list, timer: metrics.PhaseTimer, started: float) -> None:
        self.write()
        done: list[float] = []

        def wait() -> None:
            jax.block_until_ready(results)
            done.append(time.perf_counter())

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        record["compilations"] = self._run.counter.count - self._compiled
        self._compiled = self._run.counter.count
        self._pending = record, results, timer, started, thread, done

    @contextlib.contextmanager
    def extra(self, name: str) -> Iterator[None]:
        """Seconds of what comes between two steps, for the next record."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._extra[name] = self._extra.get(name, 0.0) + time.perf_counter() - start

    def write(self, next_step: metrics.PhaseTimer | None = None) -> None:
        """Writes what is pending; `next_step`: the phases of the step that has been drawn meanwhile."""
        if self._pending is None:
            return
        (record, results, timer, started, thread, done), self._pending = self._pending, None
        values = combined(jax.device_get(results))
        thread.join()
        timer.seconds["update"] = done[0] - started
        total, self._ended = done[0] - self._ended, done[0]
        if next_step and "rollout" in next_step.starts:  # it began with waiting for this update
            next_step.seconds["rollout"] -= max(0.0, done[0] - next_step.starts["rollout"])
        record |= values
        record["skipped_updates"] = self._run.skipped_before + record["skipped_updates"]
        record["seconds"] = total
        record |= {f"seconds_{phase}": seconds for phase, seconds in timer.seconds.items()} | self._extra
        record["tokens_per_second"] = record["trained_tokens"] / max(total - sum(self._extra.values()), 1e-9)
        self._extra.clear()
        record |= metrics.device_memory()
        self._run.record(record)
