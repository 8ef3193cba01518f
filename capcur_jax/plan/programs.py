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
from capcur_jax.models import published, ways
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.models.config import ModelConfig, TextConfig, VisionConfig
from capcur_jax.models.inputs import Processor
from capcur_jax.models.lora import LoRA
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.plan import lengths, work
from capcur_jax.plan.work import Slots
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local.engine import LocalEngine
from capcur_jax.rollout.local.places import Pool
from capcur_jax.schedule import Stage

# Of every published tokenizer: both end tokens, the vision placeholders, padding.
SAMPLING = ("prefill", "decoding")  # what the local engine runs
_WORKING = 0.12  # share of the usable memory that is left to what programs make while they run
END, BANNED, PAD = (151645, 151643), (151652, 151653, 151654, 151655, 151656), 151643


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a stage at its largest declared shapes."""

    name: str
    times: int  # runs in a step
    trace: Callable[[], Any]
    given: int  # bytes a device of its arguments, those that it does not use included
    resident: int  # bytes a device of what lies there while it runs and is no argument
    turns: int = 0  # of its loop that ends with its responses; 0: it has none
    at: Callable[..., Any] | None = None  # traces it at another shape, where that counts


class Variant(NamedTuple):
    """Stages that share their programs."""

    stages: tuple[Stage, ...]
    images: bool
    mesh: Mesh  # of the trainer
    programs: tuple[Program, ...]
    shapes: dict[str, Any]  # what the largest shapes are
    parameters: int
    layout: Layout
    forward: Callable[..., Any]  # traces a pass of the trainer at a shape of packed rows
    slots: Slots  # of the local engine
    page_bytes: int  # a device's, of a page of all layers
    state_bytes: int  # a device's, of what the trainer keeps
    weight_bytes: int  # of a model as a sampler reads it


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
    kinds = {"dtype": jnp.dtype(settings.dtype), "remat": policy.remat(config), "attention": settings.attention}
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


def variants(
    config: ConfigDict, devices: Sequence[jax.Device], without_images: Sequence[str], usable: int | None = None
) -> list[Variant]:
    """What the stages of `config.order` compile. Raises InputError.

    Where config.mesh.gpus names some of a host's devices, these train; the servers' programs are not part of the plan.

    Args:
        without_images: stages whose prompts have none.
        usable: bytes of a device, which the sampler's pages fill where config.rollout.pages is 0. None: they are as
            many as all slots may need.
    """
    processor = architecture(config)
    trained_on = devices[: len(config.mesh.gpus) or None]
    if len(trained_on) < len(config.mesh.gpus):
        raise InputError(f"config.mesh.gpus = {config.mesh.gpus}: the topology has {len(devices)} devices")
    groups: dict[Any, list[Stage]] = {}
    for stage in schedule.stages(config):
        key = stage.objective, stage.freeze, stage.name in without_images, stage.prompts
        groups.setdefault(key, []).append(stage)
    result = []
    for (_, _, textual, _), stages in groups.items():
        mesh = sharding.make_mesh(config.mesh, trained_on)
        result.append(_variant(config, processor, tuple(stages), mesh, not textual, usable))
    return result


def _variant(
    config: ConfigDict,
    processor: Processor,
    stages: tuple[Stage, ...],
    mesh: Mesh,
    images: bool,
    usable: int | None,
) -> Variant:
    stage = stages[0]
    buckets = Buckets.of(config.prompt, processor.config.vision)
    layout = Layout.of(stage, config, buckets, processor, mesh, images)
    graph, parameters = abstract_model(config, processor.config, mesh, jnp.dtype(config.optimizer.parameters))
    learner = Learner(
        graph, parameters, objective=stage.objective, config=config,
        freeze=lora_lib.pattern() if config.model.lora.rank else stage.freeze,
        temperature=config.rollout.temperature, banned=processor.banned_tokens, mesh=mesh,
    )  # fmt: skip
    shape = max(layout.shapes)
    scored, batch = (layout.blank(shape, passes=passes) for passes in (True, False))

    trained, frozen = learner.split(parameters)
    state, sums = learner.abstract_state(), _sums(learner, trained, frozen, batch, mesh)
    rate = jax.ShapeDtypeStruct((), np.float32)
    reference = None
    if layout.reference:
        reference = _as(trained, jnp.dtype(config.reference.dtype))

    moments = 0 if config.optimizer.memory != "device" else on_device(state.optimizer)
    kept = 0 if reference is None or config.reference.memory != "device" else on_device(reference)
    ahead = on_device(batch)  # the next one is on its way while a batch is being worked on
    engine, copy = None, 0
    if policy.engine_kind(config).in_process:  # a stage that samples nothing has the copy, too
        engine = _engine(config, processor, buckets, mesh)
        copy = on_device(engine.weights)  # it stays between the sampler's calls
        if layout.sampled and usable and not config.rollout.pages:
            held = moments + on_device(sums) + kept + copy + on_device(parameters)
            pages = _pages(engine, config, int(usable * (1 - _WORKING)) - held)
            engine = _engine(config, processor, buckets, mesh, pages)
    updates = work.updates(
        lengths.extreme(config, processor.config.vision.merge_size, largest=True)(stage, images), layout
    )
    micro = sum(map(len, updates))
    programs = []
    if reference is not None:
        beside = on_device(trained) + moments + on_device(sums) + copy + ahead
        programs.append(_score("reference log-probs", learner, reference, frozen, scored, micro, beside))
    if layout.old:
        beside = moments + on_device(sums) + copy + ahead
        beside += on_device(reference) if reference is not None else 0  # fetched for the pass if it lies on the host
        # The first update's old policy is the one that it trains.
        times = micro - len(updates[0])
        programs.append(_score("old log-probs", learner, trained, frozen, scored, times, beside))
    programs.append(
        Program(
            "gradient",
            micro,
            lambda: learner.accumulate.trace(trained, frozen, sums, batch),
            on_device((trained, frozen, sums, batch)),
            moments + kept + copy + ahead,
            at=lambda shape: learner.accumulate.trace(trained, frozen, sums, layout.blank(shape, passes=False)),
        )
    )
    apply = lambda: learner.apply.trace(state, sums, rate)  # noqa: E731
    programs.append(Program("update", layout.updates, apply, on_device((state, sums)), on_device(frozen) + kept + copy))
    slots, page = Slots(0, 0, Pool(0, 0)), 0
    if engine is not None and layout.sampled:
        beside = moments + on_device(sums) + kept
        large = _sizes(config, processor.config.vision.merge_size, images)
        sampling, slots = _sampling(engine, config, stage, large, images, beside)
        programs += sampling
        opened = engine.work(config.rollout.group, _sampled(config))
        page = on_device(engine.pages_shape(opened)) // opened.pool.pages
    shapes = {
        "prompts of a step": stage.prompts,
        "updates of a step": layout.updates,
        "packed rows of a gradient": sharding.row_shards(mesh),
        "tokens of a packed row": shape.length,
        "patches of a packed row": shape.patch_rows * shape.patches,
        "prompts of a packed row": layout.bounds.groups,
        "responses of a prompt": layout.bounds.group,
        "tokens of a prompt": layout.bounds.prompt,
        "tokens of a response": layout.bounds.response,
        "tokens to sample": config.rollout.max_new_tokens if layout.sampled else 0,
        "attention of packed rows": _way(config, processor.config.text, mesh, shape.length),
    }
    if shape.patches:
        shapes["attention of images"] = _way(config, processor.config.vision, mesh, shape.patches, "whole rows")
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    forward = lambda shape: learner.score.trace(trained, frozen, layout.blank(shape, passes=True))  # noqa: E731
    kept = on_device((state, sums)) + (on_device(reference) if reference is not None else 0)
    weights = count * jnp.dtype(config.model.dtype).itemsize
    return Variant(stages, images, mesh, tuple(programs), shapes, count, layout, forward, slots, page, kept, weights)


def _sums(learner: Learner, trained: nnx.State, frozen: nnx.State, batch: UpdateBatch, mesh: Mesh) -> Sums:
    one = sharding.replicated(mesh)
    metrics = learner.zeros.trace(trained, frozen, batch).out_info.metrics
    return Sums(
        _as(trained, np.float32), jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), metrics)
    )


def _score(name, learner, policy, frozen, batch, times, resident) -> Program:
    return Program(
        name,
        times,
        lambda: learner.score.trace(policy, frozen, batch),
        on_device((policy, frozen, batch)),
        resident,
    )


def _engine(config: ConfigDict, processor: Processor, buckets: Buckets, mesh: Mesh, pages: int = 0) -> LocalEngine:
    """With parameters by shape alone."""
    graph, parameters = abstract_model(config, processor.config, mesh, jnp.dtype(config.optimizer.parameters))
    kinds = policy.local_sampler(config, sharding.row_shards(mesh))
    return LocalEngine(
        nnx.merge(graph, parameters), processor, buckets=buckets, **kinds | {"pages": pages or kinds["pages"]}
    )  # fmt: skip


def _sampled(config: ConfigDict) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)


def _pages(engine: LocalEngine, config: ConfigDict, room: int) -> int:
    """Pages of a device row that so many bytes of a device hold: those of one response at least, and no more than all
    slots may need."""
    work = engine.work(config.rollout.group, _sampled(config))
    each = on_device(engine.pages_shape(work)) // work.pool.pages
    return min(max(room // each, work.table), work.pool.pages)


def _sampling(
    engine: LocalEngine, config: ConfigDict, stage: Stage, large: list[PromptSize], images: bool, resident: int
) -> tuple[list[Program], Slots]:
    """What the local engine runs, prefill and a burst of decoding, and its slots. `resident`: bytes of a device that
    lie there beside its pages, the parameters and the copy of them."""
    mesh, group = engine.mesh, config.rollout.group
    rows = sharding.row_shards(mesh)
    work = engine.work(group, _sampled(config))
    pages = engine.pages_shape(work)
    # This process's prompts: `admitted` makes all processes' arrays of them.
    largest = max(engine.buckets.shapes(large, images, work.prompts))
    each = min(work.prompts, engine.buckets.row // max(size.tokens for size in large))
    copy, parameters = on_device(engine.weights), on_device(engine.parameters)
    return [
        Program(
            SAMPLING[0],
            math.ceil(stage.prompts / (each * rows)),
            lambda: work.admit.trace(*engine.admitted(work, pages, largest, group)),
            parameters + on_device(pages),
            resident + copy,
            at=lambda shape: work.admit.trace(*engine.admitted(work, pages, shape, group)),
        ),
        Program(
            SAMPLING[1],
            # As many as it takes to decode all responses in the slots, none of which stays free.
            math.ceil(stage.prompts * group / (work.rows * rows)),
            lambda: work.decode[work.own].trace(*engine.decoded(work, pages, work.rows)),
            copy + on_device(pages),
            resident + parameters,
            turns=config.rollout.max_new_tokens,
        ),
    ], Slots(work.rows, work.prompts, work.pool)


def _sizes(config: ConfigDict, merge: int, images: bool) -> list[PromptSize]:
    """As many prompts as a batch may have, all of the largest declared size."""
    most = max(stage.prompts for stage in schedule.stages(config))
    return [lengths.declared(config, merge, images, max)] * most


def _way(
    config: ConfigDict, tower: TextConfig | VisionConfig, mesh: Mesh, length: int, plain: str = ways.GATHERED
) -> str:
    """Which way attention of rows of that length takes on a device, and why; `plain`: what XLA's is called."""
    platform, heads = mesh.devices.flat[0].platform, tower.heads // mesh.shape["tensor"]
    platform = "cuda" if platform == "gpu" else platform
    shape = 1, length, heads, tower.head_dim
    way = ways.of(platform, shape, jnp.dtype(config.model.dtype), config.model.attention)
    return str(way if way.kernels else way._replace(name=plain))


def _as(tree: nnx.State, dtype: Any) -> nnx.State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree)
