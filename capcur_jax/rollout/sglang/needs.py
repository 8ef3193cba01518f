"""What a run with SGLang servers needs of its config and from outside, asked before anything starts.

Apart from settings.py: presets read that one, and a mistyped flag should not wait for JAX.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from ml_collections import ConfigDict

from capcur_jax.devices import distributed
from capcur_jax.errors import InputError
from capcur_jax.rollout.sglang.settings import WHERE, Settings


def missing(config: ConfigDict) -> list[str]:
    """What is not there, a line each. Process 0 starts the servers; the other hosts need not have their environment."""
    section = config.rollout.sglang
    if section.addresses or not distributed.is_owner() or shutil.which(section.python):
        return []
    return [f"{WHERE}.python = {section.python!r} is no executable: docs/rollouts.md"]


def check(config: ConfigDict) -> None:
    """Raises InputError for settings that do not go together."""
    settings, ahead = Settings.from_config(config.rollout.sglang), config.rollout.async_steps
    _check_gpus(config.mesh.gpus, settings)
    if ahead and config.objective.sampler_correction == "none":
        raise InputError(
            "config.rollout.async_steps = 1 trains on samples of older weights: set "
            "config.objective.sampler_correction to 'truncate' (or 'mask')"
        )
    if ahead and settings.colocate:
        raise InputError(
            f"config.rollout.async_steps = 1 samples while the trainer works: with {WHERE}.colocate the two take "
            "turns; choose one"
        )


def _check_gpus(trainers: Sequence[int], settings: Settings) -> None:
    """A GPU is the trainer's or a server's, unless they take turns."""
    if settings.device != "cuda" or settings.addresses or settings.colocate:
        return
    served = set(settings.gpus or range(settings.servers * settings.tensor_parallel))
    if not trainers or served & set(trainers):
        raise InputError(
            f"config.mesh.gpus = {tuple(trainers)}: the trainer would take GPUs that servers have "
            f"({', '.join(map(str, sorted(served)))}, {WHERE}.gpus); give each its own, or set "
            f"{WHERE}.colocate=True to take turns"
        )
