"""The engine that a config names."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax.errors import InputError
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor
from capcur_jax.models.lora import LoRA
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.rollout.engine import Engine
from capcur_jax.rollout.local.engine import LocalEngine
from capcur_jax.rollout.sglang.settings import Settings

ENGINES = ("local", "sglang")


def check(config: ConfigDict) -> None:
    """Raises InputError for rollout settings that don't go together."""
    rollout = config.rollout
    if rollout.async_steps not in (0, 1):
        raise InputError(f"config.rollout.async_steps = {rollout.async_steps}; choose 0 (on-policy) or 1")
    if rollout.engine == "local":
        if rollout.async_steps:
            raise InputError(
                "config.rollout.async_steps = 1 needs config.rollout.engine = 'sglang': the local engine reads the "
                "trainer's own parameters, which an update overwrites"
            )
        return
    settings = Settings.from_config(rollout.sglang)
    _check_gpus(config, settings)
    if rollout.async_steps and config.objective.sampler_correction == "none":
        raise InputError(
            "config.rollout.async_steps = 1 trains on samples of older weights: set "
            "config.objective.sampler_correction to 'truncate' (or 'mask')"
        )
    if rollout.async_steps and settings.colocate:
        raise InputError(
            "config.rollout.async_steps = 1 samples while the trainer works: with config.rollout.sglang.colocate the "
            "two take turns; choose one"
        )


def _check_gpus(config: ConfigDict, settings: Settings) -> None:
    """A GPU is the trainer's or a server's, unless they take turns."""
    if settings.device != "cuda" or settings.addresses or settings.colocate:
        return
    served = set(settings.gpus or range(settings.servers * settings.tensor_parallel))
    if not config.mesh.gpus or served & set(config.mesh.gpus):
        raise InputError(
            f"config.mesh.gpus = {tuple(config.mesh.gpus)}: the trainer would take GPUs that servers have "
            f"({', '.join(map(str, sorted(served)))}, config.rollout.sglang.gpus); give each its own, or set "
            "config.rollout.sglang.colocate=True to take turns"
        )


def open_engine(
    config: ConfigDict,
    model: QwenVL,
    processor: Processor,
    *,
    source: Path,
    workdir: Path,
    buckets: Buckets,
    mesh: Mesh,
    lora: LoRA | None,
) -> Engine:
    """Starts it, with the model's parameters; of several processes all call this together. Raises InputError."""
    rollout = config.rollout
    if rollout.engine == "local":
        kinds = {"slots": rollout.slots, "prefill": rollout.prefill, "gathered": rollout.gathered}
        return LocalEngine(model, processor, buckets=buckets, mesh=mesh, **kinds)
    from capcur_jax.rollout.sglang.engine import SGLangEngine  # here: a run with the local engine needs no HTTP

    settings = Settings.from_config(rollout.sglang)
    return SGLangEngine(processor, source, workdir, settings, lora=lora, seed=config.seed)
