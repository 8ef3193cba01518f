"""Checks before a run starts: a mistake gets one clear message, and everything that is missing is named at once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from capcur_jax import bounds, policy, presets
from capcur_jax.checkpoints.checkpointing import Checkpoints, check_same_config, go_on
from capcur_jax.data.problem import Problem, short
from capcur_jax.data.prompts import PLACEMENTS
from capcur_jax.data.sets import Sets
from capcur_jax.devices import distributed
from capcur_jax.errors import InputError
from capcur_jax.files import must_be_local
from capcur_jax.learner import objectives
from capcur_jax.learner.residence import MEMORIES
from capcur_jax.models import config as model_config
from capcur_jax.models import weight_files
from capcur_jax.models.config import DTYPES
from capcur_jax.models.layers import REMAT
from capcur_jax.records import jsonl
from capcur_jax.records.alarms import ALARMS
from capcur_jax.schedule import Stage

# What a run that goes on may have changed: where it computes and keeps things, and what it writes.
MAY_CHANGE = (
    "mesh", "log", "checkpointing", "export", "reference.memory", "optimizer.memory", "reward.workers",
    "data.workers", "data.image_cache_mb", "evaluation.base_results", "model.remat",
    "rollout.slots", "rollout.page", "rollout.pages", "rollout.prefill", "rollout.gathered", "rollout.sglang",
)  # fmt: skip


CHOICES = {
    "model.remat": (policy.AUTO, *REMAT),
    "prompt.instruction": PLACEMENTS,
    "evaluation.instruction": PLACEMENTS,
    "evaluation.base_instruction": PLACEMENTS,
    "objective.ratio": objectives.RATIO_LEVELS,
    "objective.kl_estimator": objectives.KL_ESTIMATORS,
    "objective.aggregation": objectives.AGGREGATIONS,
    "objective.sampler_correction": objectives.SAMPLER_CORRECTIONS,
    "objective.sampler_level": objectives.RATIO_LEVELS,
    "model.dtype": DTYPES,
    "export.dtype": DTYPES,
    "reference.dtype": DTYPES,
    "optimizer.parameters": DTYPES,
    "optimizer.moments": DTYPES,
    "reference.memory": MEMORIES,
    "optimizer.memory": MEMORIES,
}


def check(config: ConfigDict, stages: Sequence[Stage], sets: Sets) -> None:
    """Everything the run needs from outside, missing things named all at once. Raises InputError."""
    presets.check_deleted(config)
    bounds.check(config)
    _check_paths(config, "config")
    for stage in stages:
        objectives.of_stage(stage)
    missing = []
    if not config.checkpoint and not config.create:
        missing.append(
            "config.checkpoint: a Qwen3-VL, as a Hugging Face checkpoint directory (--config.checkpoint=DIR) or by its "
            "name on the Hub (--config.checkpoint=OWNER/NAME)"
        )
    for name, split in sorted(splits(config, stages)):
        if name not in config.data.sets:
            missing.append(f"config.evaluation.sets names '{name}', which config.data.sets lacks")
            continue
        entry = config.data.sets[name]
        if split not in entry or split == "source":
            missing.append(f"config.evaluation.split = {split!r}; choose train, validation or test")
        elif sets.missing(name, split):
            missing.append(f"config.data.sets.{name}.{split}: {sets.missing(name, split)}")
        elif entry[split] and not sets.path(name, split).exists():
            missing.append(f"config.data.sets.{name}.{split}: {sets.path(name, split)} does not exist")
    missing += policy.engine_kind(config).missing(config)
    if missing:
        raise InputError("\n".join(["this run needs what is not there:", *(f"  - {line}" for line in missing)]))
    _check_together(config, stages)


def _check_paths(section: ConfigDict, where: str) -> None:
    """That no value is a bucket's address. Raises InputError."""
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            _check_paths(value, f"{where}.{key}")
        elif isinstance(value, str):
            must_be_local(f"{where}.{key}", value)


def splits(config: ConfigDict, stages: Sequence[Stage]) -> set[tuple[str, str]]:
    """The (set, split) that a run reads."""
    read = {(name, "train") for stage in stages for name in stage.data}
    read |= {(name, config.evaluation.split) for name in config.evaluation.sets}
    if config.validation.every:
        read |= {(name, "validation") for name in config.evaluation.sets}
    return read


def _check_together(config: ConfigDict, stages: Sequence[Stage]) -> None:
    """Values that do not go together: they would fail hours later, or quietly train nothing."""
    for key, choices in CHOICES.items():
        section, _, name = key.rpartition(".")
        if (value := config[section][name]) not in choices:
            raise InputError(f"config.{key} = {value!r}; choose one of {', '.join(choices)}")
    policy.engine_kind(config).check(config)
    rollout, correction = config.rollout, config.objective.sampler_correction
    if correction != "none" and (rollout.top_p < 1 or rollout.top_k):
        raise InputError(
            f"config.objective.sampler_correction = {correction!r} with config.rollout.top_p = {rollout.top_p}, top_k "
            f"= {rollout.top_k}: engines report log-probs of the full softmax, not of the part that was drawn from, so "
            "the weights would be wrong by the mass that was cut off; set top_p = 1 and top_k = 0, or no correction"
        )
    for name in config.log.stop_at:
        if name not in ALARMS:
            raise InputError(f"config.log.stop_at = {name!r}; choose from {', '.join(ALARMS)}")
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("config.log.wandb needs Weights & Biases: pip install -e '.[wandb]', or leave it empty")
    for stage in stages:
        _check_rule(config, stage)
        if not objectives.of_stage(stage).sampled:
            continue
        if stage.prompts % config.objective.updates_per_batch:
            raise InputError(
                f"config.stages.{stage.name}.prompts = {stage.prompts} can't be split into "
                f"config.objective.updates_per_batch = {config.objective.updates_per_batch} equal updates"
            )
        if config.rollout.group < 2:
            raise InputError("config.rollout.group = 1: an advantage is a comparison inside the group; set at least 2")
        if config.rollout.temperature <= 0:
            raise InputError("config.rollout.temperature must be above 0: greedy groups are all equal")
    if max(config.prompt.token_buckets, default=0) < config.prompt.max_tokens:
        raise InputError("config.prompt.token_buckets must reach config.prompt.max_tokens")


def _check_rule(config: ConfigDict, stage: Stage) -> None:
    """That what decides of the stage's end is measured. Raises InputError."""
    where = f"config.stages.{stage.name}.switch.rule = {stage.switch.rule!r}"
    if stage.switch.rule == "plateau":
        if not config.validation.every:
            raise InputError(f"{where} needs validations: --config.validation.every=20")
        if not set(stage.data) & set(config.evaluation.sets):
            raise InputError(f"{where}: config.evaluation.sets has none of {', '.join(stage.data)} to be validated")
    if stage.switch.rule == "mastered" and not objectives.of_stage(stage).sampled:
        raise InputError(f"{where}: objective '{stage.objective}' samples no response that could be right")


def check_data(config: ConfigDict, stages: Sequence[Stage], sets: Sets) -> None:
    """That each curriculum finds what it needs in the data, that epochs come to a step at least, and that what is
    graded has an answer. Raises InputError."""
    for stage in stages:
        selected = sets.selected(stage.data, stage.curriculum)
        if stage.epochs:
            counts = [len(problems) for problems in selected]
            stage.curriculum.steps(counts, stage.prompts, stage.epochs, f"config.stages.{stage.name}")
        if objectives.of_stage(stage).sampled:
            for name, problems in zip(stage.data, selected, strict=True):
                _check_answers(f"the {stage.objective} stage '{stage.name}'", sets, name, "train", problems)
    for split in dict.fromkeys([config.evaluation.split, *(["validation"] if config.validation.every else [])]):
        for name in config.evaluation.sets:
            _check_answers("an accuracy", sets, name, split, sets.problems(name, split))


def _check_answers(who: str, sets: Sets, name: str, split: str, problems: Sequence[Problem]) -> None:
    """A row without an answer has reward 0 whatever the response."""
    without = [problem.id for problem in problems if not problem.answer]
    if without:
        raise InputError(
            f"config.data.sets.{name}.{split}: {sets.path(name, split)}: {who} needs an answer in each row, and "
            f"{len(without)} of {len(problems)} have none (the first: {', '.join(map(short, without[:3]))}); such rows "
            "are for stages with objective = 'sft', which imitate `response`: take them out, or give them an answer"
        )


def check_devices(config: ConfigDict) -> None:
    """That JAX sees the GPUs that are the trainer's. Raises InputError."""
    gpus = config.mesh.gpus
    if gpus and jax.default_backend() == "gpu" and jax.local_device_count() != len(gpus):
        raise InputError(
            f"config.mesh.gpus = {tuple(gpus)}, but JAX has {jax.local_device_count()} of this host's GPUs: start "
            "the run with capcur_jax.main, one process a host, or set CUDA_VISIBLE_DEVICES and leave the key empty"
        )


def check_same(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """The config in plain JSON types; raises InputError if the directory holds a run with another one."""
    plain, stored = jsonl.plain(config.to_dict()), workdir / "config.json"
    if stored.exists():
        check_same_config(json.loads(stored.read_text(encoding="utf-8")), plain, MAY_CHANGE)
    return plain


def goes_on_from(workdir: Path, config: ConfigDict, checkpoints: Checkpoints) -> int | None:
    """The number of the checkpoint that a run with this config goes on from; None: there is none, it starts anew.

    A run whose only checkpoint is that before its first step has learned nothing that is left, and starts anew as well:
    with another config or other data, too. Of several processes all call this. Raises InputError if it was another
    config that the run has learned with.
    """
    last = checkpoints.latest()
    if last is None:
        return None
    if not checkpoints.progress(last)[0].step:
        # First the records of steps: without a checkpoint they would be those of one that was taken away.
        go_on(workdir, distributed.is_owner(), checkpoints, last)
        checkpoints.clear()
        return None
    check_same(workdir, config)
    return last


def finished(workdir: Path, config: ConfigDict, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The summary of the run that the directory holds, if it came to its end and what it exported is there.

    Raises InputError if it was a run with another config.
    """
    try:
        summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if summary.get("status") != "finished":
        return None
    check_same(workdir, config)
    try:
        model_config.from_directory(workdir / "checkpoints" / "final")
        weight_files.find(workdir / "checkpoints" / "final")
    except InputError as error:
        warn(f"{workdir / 'summary.json'} is of a finished run, but {error}. What is left of the run is done again")
        return None
    return summary
