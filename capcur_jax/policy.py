"""What a config makes of a checkpoint: model, prompts, rollout engine. Training and measuring open the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax.data.images import ImageStore
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.models import config as model_config
from capcur_jax.models import huggingface, published
from capcur_jax.models.batching import Buckets
from capcur_jax.models.config import dtype_of
from capcur_jax.models.inputs import Processor
from capcur_jax.models.lora import LoRA
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.rollout.engine import Engine
from capcur_jax.rollout.sglang import needs
from capcur_jax.rollout.sglang.settings import Settings

AUTO = "auto"  # of config.model.remat
BATCH = 512  # a quarter of the responses that are asked for together, where the config has no number of slots
SLOTS = 64  # of a device row, where neither the config nor the devices' memory says how many


def remat(config: ConfigDict) -> str:
    """What is computed again backwards. A run has decided before (plan/fitting.py); elsewhere there is no gradient."""
    return "full" if config.model.remat == AUTO else config.model.remat


class Policy(NamedTuple):
    """How a model is asked, without its parameters: its checkpoint's files, its prompts and their declared shapes.

    Trainer and engine hold the parameters."""

    source: Path  # the checkpoint directory
    lora: LoRA | None
    processor: Processor
    builder: PromptBuilder
    buckets: Buckets
    images: ImageStore  # to be closed

    def export(self, parameters: nnx.State, directory: Path, dtype: Any) -> Path:
        """Writes parameters as a Hugging Face checkpoint; LoRA's factors are merged into the weights."""
        huggingface.save(directory, parameters, self.processor.config, self.source, dtype, lora=self.lora)
        return directory

    def warm_up_export(self, parameters: nnx.State, dtype: Any) -> None:
        """Compiles what an export runs: small programs, where parameters lie on several devices."""
        for _ in huggingface.published_tensors(parameters, self.processor.config, dtype, self.lora):
            pass


def open_model(config: ConfigDict, source: Path, mesh: Mesh, warn: Callable[[str], None]) -> tuple[QwenVL, Policy]:
    """Loads the checkpoint `source`; without config.checkpoint its weights are drawn. Raises InputError."""
    prompt, lora = config.prompt, config.model.lora
    kinds = {"remat": remat(config), "attention": config.model.attention, "mesh": mesh}
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
    buckets = Buckets.of(prompt, known.vision, processor.images.size["shortest_edge"])
    store = ImageStore(config.data.workers, config.data.image_cache_mb)
    builder = PromptBuilder(processor, prompt.instruction, prompt.max_tokens, buckets.images.longest, store)
    return model, Policy(source, kinds["lora"], processor, builder, buckets, store)


# ---------------------------------------------------------------------- engines


class EngineKind(NamedTuple):
    """A rollout engine that a config can name.

    open: starts it.
    check: raises InputError for settings that do not go together.
    missing: lists what the engine needs and this machine lacks, one line each.
    in_process: it samples from the trainer's own parameters, with nothing to send.
    shares_devices: whether the trainer and it take turns on the same devices.
    dtype: in which it computes.
    """

    open: Callable[[ConfigDict, QwenVL, Policy, Path], Engine]
    check: Callable[[ConfigDict], None]
    missing: Callable[[ConfigDict], list[str]]
    in_process: bool
    shares_devices: Callable[[ConfigDict], bool]
    dtype: Callable[[ConfigDict], str]


def engine_kind(config: ConfigDict) -> EngineKind:
    """The one that `config.rollout.engine` names. Raises InputError."""
    name = config.rollout.engine
    if name not in ENGINES:
        raise InputError(f"config.rollout.engine = {name!r}; choose one of {', '.join(ENGINES)}")
    return ENGINES[name]


def open_engine(config: ConfigDict, model: QwenVL, policy: Policy, workdir: Path) -> Engine:
    """Starts the config's engine, with the model's parameters; `update_weights` must follow. Of several processes all
    call this together. Raises InputError."""
    return engine_kind(config).open(config, model, policy, workdir)


def _local(config: ConfigDict, model: QwenVL, policy: Policy, workdir: Path) -> Engine:
    from capcur_jax.rollout.local.engine import LocalEngine

    kinds = local_sampler(config, sharding.row_shards(model.mesh))
    return LocalEngine(model, policy.processor, buckets=policy.buckets, **kinds)


def slots(config: ConfigDict, rows: int) -> int:
    """Responses that the local engine decodes together on so many device rows. A run has decided before
    (plan/fitting.py)."""
    return config.rollout.slots or SLOTS * rows


def batch(config: ConfigDict) -> int:
    """Responses that an evaluation asks for together: slots that become free find work. It does not depend on devices,
    since the place in its batch is part of what a response draws from."""
    return 4 * (config.rollout.slots or BATCH)


def local_sampler(config: ConfigDict, rows: int) -> dict[str, Any]:
    """The local engine's settings, for so many device rows."""
    rollout = config.rollout
    return {
        "slots": slots(config, rows),
        "prefill": rollout.prefill,
        "gathered": bool(rollout.gathered),
        "page": rollout.page,
        "pages": rollout.pages,
    }


def _check_local(config: ConfigDict) -> None:
    if config.rollout.async_steps:
        raise InputError(
            "config.rollout.async_steps = 1 needs config.rollout.engine = 'sglang': the local engine reads the "
            "trainer's own parameters, which an update overwrites"
        )


def _sglang(config: ConfigDict, model: QwenVL, policy: Policy, workdir: Path) -> Engine:
    from capcur_jax.rollout.sglang.engine import SGLangEngine  # here: a run with the local engine needs no HTTP

    settings = Settings.from_config(config.rollout.sglang)
    return SGLangEngine(policy.processor, policy.source, workdir, settings, lora=policy.lora, seed=config.seed)


ENGINES = {
    "local": EngineKind(
        _local, _check_local, lambda config: [], True, lambda config: False, lambda config: config.model.dtype
    ),
    "sglang": EngineKind(
        _sglang,
        needs.check,
        needs.missing,
        False,
        lambda config: config.rollout.sglang.colocate,
        lambda config: config.rollout.sglang.dtype,
    ),
}


def _check_mesh(known: model_config.ModelConfig, mesh: Mesh) -> None:
    """Heads are split whole. Raises InputError."""
    tensor = mesh.shape["tensor"]
    heads = {"heads": known.text.heads, "kv heads": known.text.kv_heads, "vision heads": known.vision.heads}
    if any(count % tensor for count in heads.values()):
        counts = ", ".join(f"{count} {name}" for name, count in heads.items())
        raise InputError(f"config.mesh.tensor = {tensor} must divide the model's {counts}")
