"""The programs that a run of a config compiles, with abstract arguments: for devices that aren't there, without a
checkpoint and without data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from capcur_jax import policy, schedule
from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.hub import download
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.learner import Learner, Sums
from capcur_jax.learner.packing import UpdateBatch
from capcur_jax.models import config as config_lib
from capcur_jax.models import lora as lora_lib
from capcur_jax.models import published
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.inputs import Processor
from capcur_jax.models.lora import LoRA
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local.engine import LocalEngine
from capcur_jax.schedule import Stage

# Of every published tokenizer: both end tokens, the vision placeholders, padding.
SAMPLING = ("prefill", "decoding")  # what the local engine runs
END, BANNED, PAD = (151645, 151643), (151652, 151653, 151654, 151655, 151656), 151643


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a stage at its largest declared shapes; `smallest` traces it at the smallest ones."""

    name: str
    times: int  # runs in a step
    trace: Callable[[], Any]
    smallest: Callable[[], Any]
    given: int  # bytes a device of its arguments, those that it does not use included
    resident: int  # bytes a device of what lies there while it runs and is no argument
    trips: tuple[int, int] = (1, 1)  # of its loop of unknown length, at the largest and the smallest shapes
    reads: int = 0  # bytes that each turn of that loop reads from a device's memory


class Variant(NamedTuple):
    """Stages that share their programs."""

    stages: tuple[Stage, ...]
    images: bool
    mesh: Mesh  # of the trainer
    programs: tuple[Program, ...]
    shapes: dict[str, Any]  # what the largest shapes are
    parameters: int


def architecture(config: ConfigDict) -> Processor | SimpleNamespace:
    """Sizes and tokens of the checkpoint, if one is given, else of `config.architecture`. Raises InputError."""
    if config.checkpoint:
        return Processor.from_directory(download.checkpoint(config.checkpoint, weights=False))
    if config.architecture:
        known = config_lib.from_dict(published.config(config.architecture))
        return SimpleNamespace(config=known, end_tokens=END, banned_tokens=BANNED, pad_token=PAD)
    raise InputError(
        "a plan needs the model's sizes: give --config.checkpoint=DIR, or --config.architecture with one of "
        + ", ".join(published.NAMES)
    )


def on_device(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def abstract_model(config: ConfigDict, known: ModelConfig, mesh: Mesh, dtype: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without its parameters, and these as shapes where they would lie."""
    settings, lora = config.model, config.model.lora
    kinds = {"dtype": jnp.dtype(settings.dtype), "remat": settings.remat, "attention": settings.attention}
    kinds["lora"] = LoRA(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None
    model = nnx.eval_shape(lambda: QwenVL(known, param_dtype=dtype, mesh=mesh, rngs=nnx.Rngs(0), **kinds))
    graph, parameters = nnx.split(model)
    leaves = [
        (path, leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_of(mesh, path, leaf.shape))))
        for path, leaf in nnx.to_flat_state(parameters)
    ]
    return graph, nnx.from_flat_state(leaves)


def _of(mesh: Mesh, path: Sequence[Any], shape: Sequence[int]):
    return sharding.of_parameter(mesh, ".".join(map(str, path)), shape)


def variants(config: ConfigDict, devices: Sequence[jax.Device], without_images: Sequence[str]) -> list[Variant]:
    """What the stages of `config.order` compile. Raises InputError.

    Where config.mesh.gpus names some of a host's devices, these train; the servers' programs are not part of the plan.

    Args:
        without_images: stages whose prompts have none.
    """
    processor = architecture(config)
    trained_on = devices[: len(config.mesh.gpus) or None]
    if len(trained_on) < len(config.mesh.gpus):
        raise InputError(f"config.mesh.gpus = {config.mesh.gpus}: the topology has {len(devices)} devices")
    groups: dict[Any, list[Stage]] = {}
    for stage in schedule.stages(config):
        if stage.epochs:
            where = f"config.stages.{stage.name}"
            raise InputError(f"{where}.epochs: a plan has no data to count; give {where}.steps, and epochs=0")
        key = stage.objective, stage.freeze, stage.name in without_images, stage.prompts
        groups.setdefault(key, []).append(stage)
    result = []
    for (_, _, textual, _), stages in groups.items():
        mesh = sharding.make_mesh(config.mesh, trained_on)
        result.append(_variant(config, processor, tuple(stages), mesh, not textual))
    return result


def _variant(config: ConfigDict, processor: Processor, stages: tuple[Stage, ...], mesh: Mesh, images: bool) -> Variant:
    stage = stages[0]
    buckets = Buckets(config.prompt.token_buckets, config.prompt.patch_row, config.prompt.patch_rows)
    layout = Layout.of(stage, config, buckets, processor, mesh, images)
    graph, parameters = abstract_model(config, processor.config, mesh, jnp.dtype(config.optimizer.parameters))
    learner = Learner(
        graph, parameters, objective=stage.objective, config=config,
        freeze=lora_lib.pattern() if config.model.lora.rank else stage.freeze,
        temperature=config.rollout.temperature, banned=processor.banned_tokens, mesh=mesh,
    )  # fmt: skip
    large, small = (_sizes(config, largest, images) for largest in (True, False))
    scored, scored_small = (_extreme(layout.blanks(s, passes=True), k) for s, k in ((large, max), (small, min)))
    batch, batch_small = (_extreme(layout.blanks(s, passes=False), k) for s, k in ((large, max), (small, min)))

    trained, frozen = learner.split(parameters)
    state, sums = learner.abstract_state(), _sums(learner, trained, frozen, batch, mesh)
    rate = jax.ShapeDtypeStruct((), np.float32)
    reference = None
    if layout.reference:
        reference = _as(trained, jnp.dtype(config.reference.dtype))

    moments = 0 if config.optimizer.memory != "device" else on_device(state.optimizer)
    kept = 0 if reference is None or config.reference.memory != "device" else on_device(reference)
    ahead = on_device(batch)  # the next one is on its way while a batch is being worked on
    engine = None
    if layout.sampled and policy.engine_kind(config).in_process:
        engine = _engine(config, processor, buckets, mesh)
        if config.rollout.gathered:  # the sampler's copy stays
            kept, ahead = kept + on_device(engine.parameters), ahead + on_device(engine.parameters)
    micro = stage.prompts // batch.prompts.tokens.shape[0]
    programs = []
    if reference is not None:
        beside = on_device(trained) + moments + on_device(sums) + ahead
        programs.append(_score("reference log-probs", learner, reference, frozen, scored, scored_small, micro, beside))
    if layout.old:
        beside = moments + on_device(sums) + ahead
        beside += on_device(reference) if reference is not None else 0  # fetched for the pass if it lies on the host
        programs.append(_score("old log-probs", learner, trained, frozen, scored, scored_small, micro, beside))
    programs.append(
        Program(
            "gradient",
            micro,
            lambda: learner.accumulate.trace(trained, frozen, sums, batch),
            lambda: learner.accumulate.trace(trained, frozen, sums, batch_small),
            on_device((trained, frozen, sums, batch)),
            moments + kept + ahead,
        )
    )
    apply = lambda: learner.apply.trace(state, sums, rate)  # noqa: E731
    programs.append(Program("update", layout.updates, apply, apply, on_device((state, sums)), on_device(frozen) + kept))
    if engine is not None:
        beside = moments + on_device(sums) + kept
        programs += _sampling(engine, config, stage, large, small, images, beside)
    shapes = {
        "prompts of a step": stage.prompts,
        "updates of a step": layout.updates,
        "prompts of a gradient": batch.prompts.tokens.shape[0],
        "of them on a device row": batch.prompts.tokens.shape[0] // sharding.row_shards(mesh),
        "responses of a prompt": config.rollout.group if layout.sampled else 1,
        "tokens of a prompt": batch.prompts.tokens.shape[1],
        "patches of a prompt": 0 if batch.prompts.vision is None else _patches(batch),
        "tokens of a response": [slab.tokens.shape[1] for slab in batch.slabs],
        "tokens to sample": config.rollout.max_new_tokens if layout.sampled else 0,
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    return Variant(stages, images, mesh, tuple(programs), shapes, count)


def _sums(learner: Learner, trained: nnx.State, frozen: nnx.State, batch: UpdateBatch, mesh: Mesh) -> Sums:
    one = sharding.replicated(mesh)
    metrics = learner.zeros.trace(trained, frozen, batch).out_info.metrics
    return Sums(
        _as(trained, np.float32), jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), metrics)
    )


def _score(name, learner, policy, frozen, batch, smallest, times, resident) -> Program:
    return Program(
        name,
        times,
        lambda: learner.score.trace(policy, frozen, batch),
        lambda: learner.score.trace(policy, frozen, smallest),
        on_device((policy, frozen, batch)),
        resident,
    )


def _engine(config: ConfigDict, processor: Processor, buckets: Buckets, mesh: Mesh) -> LocalEngine:
    """With parameters by shape alone."""
    graph, parameters = abstract_model(config, processor.config, mesh, jnp.dtype(config.optimizer.parameters))
    return LocalEngine(
        nnx.merge(graph, parameters), processor, slots=config.rollout.slots, prefill=config.rollout.prefill,
        gathered=config.rollout.gathered, buckets=buckets,
    )  # fmt: skip


def _sampling(
    engine: LocalEngine,
    config: ConfigDict,
    stage: Stage,
    large: list[PromptSize],
    small: list[PromptSize],
    images: bool,
    resident: int,
) -> list[Program]:
    """What the local engine runs: prefill, and decoding until a slot is free again."""
    known, mesh, group, T = engine.processor.config, engine.mesh, config.rollout.group, config.rollout.max_new_tokens
    _, parameters = abstract_model(config, known, mesh, jnp.dtype(config.optimizer.parameters))
    if config.rollout.gathered:  # the copy is the programs' argument; the trainer's own lie there, too
        resident += on_device(parameters) - on_device(engine.parameters)
    shortest, rows = min(max(lengths) for lengths in config.packing.buckets), sharding.row_shards(mesh)
    sampling = Sampling(T, config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
    work = engine.work(group, sampling)

    slots = engine.slots_shape(work)

    def arguments(sizes, largest):
        shape = (max if largest else min)(engine.buckets.shapes(sizes, images, work.prompts * rows, rows))
        return engine.abstract(slots, shape, group)

    tensor, text, width = mesh.shape["tensor"], known.text, jnp.dtype(config.model.dtype).itemsize
    decoder = sum(leaf.size for path, leaf in nnx.to_flat_state(parameters) if path[0] != "visual")
    cache = work.rows * (max(config.prompt.token_buckets) + T) * 2 * text.depth * text.kv_heads * text.head_dim * width
    # As many steps as it takes to decode all responses in the slots, none of which stays free.
    turns = math.ceil(stage.prompts * group / (work.rows * rows))
    return [
        Program(
            SAMPLING[0],
            math.ceil(stage.prompts / (work.prompts * rows)),
            lambda: work.admit.trace(*arguments(large, True)[0]),
            lambda: work.admit.trace(*arguments(small, False)[0]),
            on_device((engine.parameters, slots)),
            resident,
        ),
        Program(
            SAMPLING[1],
            turns,
            lambda: work.decode.trace(*arguments(large, True)[1]),
            lambda: work.decode.trace(*arguments(small, False)[1]),
            on_device((engine.parameters, slots)),
            resident,
            (T, shortest),
            # Every weight of the decoder that the device multiplies with, and the keys and values of its rows.
            (decoder * width + cache) // tensor,
        ),
    ]


def _sizes(config: ConfigDict, largest: bool, images: bool) -> list[PromptSize]:
    """As many prompts as a batch may have, all of the largest (smallest) declared size."""
    tokens = (max if largest else min)(config.prompt.token_buckets)
    share = min(1.0, (max if largest else min)(config.prompt.patch_rows))
    patches = (int(config.prompt.patch_row * share),) if images else ()
    most = max(stage.prompts for stage in schedule.stages(config))
    return [PromptSize(tokens, patches)] * max(most, config.rollout.slots)


def _extreme(batches, choose) -> UpdateBatch:
    def slots(batch: UpdateBatch) -> tuple[int, int]:
        patches = 0 if batch.prompts.vision is None else batch.prompts.vision.segments.size
        return batch.prompts.tokens.size + sum(slab.tokens.size for slab in batch.slabs), patches

    return choose(batches, key=slots)


def _patches(batch: UpdateBatch) -> int:
    return batch.prompts.vision.segments.size // batch.prompts.tokens.shape[0]


def _as(tree: nnx.State, dtype: Any) -> nnx.State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree)
