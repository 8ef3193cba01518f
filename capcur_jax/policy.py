"""A config's model with all that asks it: processor, prompts, rollout engine. Training and measuring open the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax.data.images import ImageStore
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.errors import InputError
from capcur_jax.models import config as model_config
from capcur_jax.models import huggingface, published
from capcur_jax.models.batching import Buckets
from capcur_jax.models.config import dtype_of
from capcur_jax.models.inputs import Processor
from capcur_jax.models.lora import LoRA
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.rollout.engine import Engine


class Opened(NamedTuple):
    """What a checkpoint directory and a config make together."""

    source: Path
    model: QwenVL
    lora: LoRA | None
    processor: Processor
    builder: PromptBuilder
    buckets: Buckets
    images: ImageStore  # to be closed


def open_model(config: ConfigDict, source: Path, mesh: Mesh, warn: Callable[[str], None]) -> Opened:
    """Loads the checkpoint `source`; without config.checkpoint its weights are drawn. Raises InputError."""
    prompt, lora = config.prompt, config.model.lora
    kinds = {"remat": config.model.remat, "attention": config.model.attention, "mesh": mesh}
    kinds["dtype"] = dtype_of(config.model.dtype, "config.model.dtype")
    kinds["param_dtype"] = dtype_of(config.optimizer.parameters, "config.optimizer.parameters")
    kinds["lora"] = LoRA(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None
    known = model_config.from_directory(source)
    _check_mesh(known, mesh)
    if config.checkpoint:
        model = huggingface.load(source, seed=config.seed, **kinds)
    else:
        model = huggingface.create(known, config.seed, **kinds)
    processor = Processor.from_directory(source, prompt.min_pixels, prompt.max_pixels)
    if config.architecture:
        expected = model_config.from_dict(published.config(config.architecture))
        if (expected.text, expected.vision) != (known.text, known.vision):
            warn(f"{source} is no {config.architecture}: what plan says of that does not hold here")
    merged = known.vision.merge_size**2
    if prompt.patch_row % merged:
        raise InputError(f"config.prompt.patch_row must be a multiple of {merged}: so many patches make a token")
    buckets = Buckets(tuple(prompt.token_buckets), prompt.patch_row, tuple(prompt.patch_rows))
    store = ImageStore(config.data.workers, config.data.image_cache_mb)
    builder = PromptBuilder(processor, prompt.instruction, prompt.max_tokens, prompt.patch_row, store)
    return Opened(source, model, kinds["lora"], processor, builder, buckets, store)


def open_engine(config: ConfigDict, opened: Opened, workdir: Path, mesh: Mesh) -> Engine:
    """Starts the config's engine, with the model's parameters; `update_weights` must follow. Of several processes all
    call this together. Raises InputError."""
    return ENGINES[config.rollout.engine](config, opened, workdir, mesh)


def _local(config: ConfigDict, opened: Opened, workdir: Path, mesh: Mesh) -> Engine:
    from capcur_jax.rollout.local.engine import LocalEngine

    rollout = config.rollout
    kinds = {"slots": rollout.slots, "prefill": rollout.prefill, "gathered": rollout.gathered}
    return LocalEngine(opened.model, opened.processor, buckets=opened.buckets, **kinds)


def _sglang(config: ConfigDict, opened: Opened, workdir: Path, mesh: Mesh) -> Engine:
    from capcur_jax.rollout.sglang.engine import SGLangEngine  # here: a run with the local engine needs no HTTP
    from capcur_jax.rollout.sglang.settings import Settings

    settings = Settings.from_config(config.rollout.sglang)
    return SGLangEngine(opened.processor, opened.source, workdir, settings, lora=opened.lora, seed=config.seed)


ENGINES = {"local": _local, "sglang": _sglang}  # config.rollout.engine


def _check_mesh(known: model_config.ModelConfig, mesh: Mesh) -> None:
    """Heads are split whole. Raises InputError."""
    tensor = mesh.shape["tensor"]
    heads = {"heads": known.text.heads, "kv heads": known.text.kv_heads, "vision heads": known.vision.heads}
    if any(count % tensor for count in heads.values()):
        counts = ", ".join(f"{count} {name}" for name, count in heads.items())
        raise InputError(f"config.mesh.tensor = {tensor} must divide the model's {counts}")
