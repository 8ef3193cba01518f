"""What a run leaves to its devices' memory: config.model.remat where it is "auto", config.rollout.gathered where it is
None. Both ways of a step cost memory and save time; they are taken where the compiler's account says that they fit.
config.rollout.slots and pages, where they are 0: the local sampler's pages fill what is left.

A plan and a run decide alike: the run by the memory that its devices have, before the model is opened. What it compiles
for that it would compile in a warm-up, but for a way that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from capcur_jax import policy, schedule
from capcur_jax.devices import distributed, sharding
from capcur_jax.devices.programs import in_background
from capcur_jax.learner import objectives
from capcur_jax.plan import cudnn, programs, topologies
from capcur_jax.plan.programs import Program, Variant

HEADROOM = 0.1  # share of a device's memory that is left free: the runtime, collectives' buffers, fragmentation
REMAT, GATHERED, SLOTS, PAGES = "model.remat", "rollout.gathered", "rollout.slots", "rollout.pages"
MOST = 320  # slots of a device row: with more, products take longer than reading the weights does
_GIB = 2**30


class Way(NamedTuple):
    """The keys' values."""

    remat: str
    gathered: bool


class Settled(NamedTuple):
    """A config in which these keys have values, and why those that it left open have theirs, by key."""

    config: ConfigDict
    why: dict[str, str]


class Account:
    """What the compiler says of programs. A program that several ways have in common is compiled once.

    Args:
        of: gives the account of a traced program, as `account` does, or more.
    """

    def __init__(self, of: Callable[[Variant, Program], dict[str, Any]]):
        self._of, self._known = of, {}

    def __call__(self, config: ConfigDict, variant: Variant, program: Program) -> dict[str, Any]:
        """Of the config's program; see `account`."""
        remat = config.model.remat if program.name == "gradient" else None
        sampling = program.name in programs.SAMPLING
        gathered = config.rollout.gathered if sampling else None
        key = variant.stages[0].name, program.name, remat, gathered, variant.slots if sampling else None
        if key not in self._known:
            self._known[key] = self._of(variant, program)
        return self._known[key]


def compiled(traced: jax.stages.Traced) -> tuple[str | None, dict[str, Any]]:
    """The program's text, and bytes of a device by the compiler's account. None, and {"out_of_memory": what it says},
    where the compiler itself refuses a program that does not fit."""
    try:
        program = in_background(traced.lower().compile)
    except Exception as error:  # jaxlib has no class of its own for it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, {"out_of_memory": str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0]}
    memory = program.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliases": "alias", "temp": "temp"}
    sizes = {f"{name}_bytes": getattr(memory, f"{field}_size_in_bytes") for name, field in names.items()}
    # A TPU's compiler reports less than this as the peak where it reuses arguments; a CPU's reports no real peak.
    held = sizes["arguments_bytes"] + sizes["outputs_bytes"] - sizes["aliases_bytes"] + sizes["temp_bytes"]
    text = program.as_text()
    workspace = cudnn.workspace(text)
    peak = max(held, memory.peak_memory_in_bytes) + workspace
    return text, sizes | {"workspace_bytes": workspace, "peak_bytes": peak}


def account(variant: Variant, program: Program) -> dict[str, Any]:
    """The memory of a program, as `compiled` has it."""
    return compiled(program.trace())[1]


def needed(program: Program, account: dict[str, Any]) -> int | None:
    """Bytes of a device while the program runs, with what lies there beside it; None: the compiler refuses it."""
    if "out_of_memory" in account:
        return None
    # Unused parameters are dropped from the program's arguments, but lie on the device all the same.
    return account["peak_bytes"] + program.resident + max(program.given - account["arguments_bytes"], 0)


def settle(
    config: ConfigDict,
    devices: Sequence[Any],
    account: Account,
    usable: int | None,
    without_images: Sequence[str] = (),
) -> Settled:
    """Gives the keys values: the fastest way whose every program fits, the one that needs the least where none does;
    and slots and pages.

    Args:
        devices: of the run, whether they are there or not.
        usable: bytes of a device; None: nobody knows.
        without_images: stages whose prompts have none.
    """
    config, sized = _slots(config, devices)
    found = _way(config, devices, account, usable, without_images)
    return _pages(Settled(found.config, found.why | sized), devices, account, usable, without_images)


def _slots(config: ConfigDict, devices: Sequence[Any]) -> tuple[ConfigDict, dict[str, str]]:
    """With slots for all responses of a step, or as many as pay."""
    sampled = [stage for stage in schedule.stages(config) if objectives.of_stage(stage).sampled]
    if config.rollout.slots or not sampled or not policy.engine_kind(config).in_process:
        return config, {}
    rows = sharding.row_shards(sharding.make_mesh(config.mesh, devices[: len(config.mesh.gpus) or None]))
    responses = max(stage.prompts for stage in sampled) * config.rollout.group
    config = _copy(config)
    config.rollout.slots = min(responses, MOST * rows)
    why = "all responses of a step" if config.rollout.slots == responses else f"{MOST} of a device row"
    return config, {SLOTS: f"{config.rollout.slots}: {why}"}


def _pages(
    settled: Settled,
    devices: Sequence[Any],
    account: Account,
    usable: int | None,
    without_images: Sequence[str],
) -> Settled:
    """With as many pages as the devices' memory holds beside all else, what the sampler's programs make included."""
    config = settled.config
    here = usable is not None and devices[0].platform != "cpu" and policy.engine_kind(config).in_process
    if config.rollout.pages or not here:
        return settled
    variants = programs.variants(config, devices, without_images, usable)
    pools = [variant.slots.pool for variant in variants if variant.slots.rows]
    if not pools:
        return settled
    config = _copy(config)
    config.rollout.pages = min(pool.pages for pool in pools)
    over = [
        needed(program, account(settled.config, variant, program))
        for variant in variants
        for program in variant.programs
        if program.name in programs.SAMPLING
    ]
    excess = max((size - usable for size in over if size is not None), default=0)
    if excess > 0:
        page = next(variant.page_bytes for variant in variants if variant.slots.rows)
        # A prompt and a response need so many: where these do not fit, the plan or the run says so.
        least = pools[0].of(config.prompt.max_tokens + config.rollout.max_new_tokens)
        config.rollout.pages = max(config.rollout.pages - -(-excess // page), least)
    why = f"{config.rollout.pages}: pages of {pools[0].size} tokens, of each device row"
    return Settled(config, settled.why | {PAGES: why})


def _way(
    config: ConfigDict,
    devices: Sequence[Any],
    account: Account,
    usable: int | None,
    without_images: Sequence[str],
) -> Settled:
    remat, gathered = config.model.remat, config.rollout.gathered
    left = {key for key, is_left in ((REMAT, remat == policy.AUTO), (GATHERED, gathered is None)) if is_left}
    least = Way(policy.remat(config), bool(gathered))
    if not left:
        return Settled(config, {})
    if devices[0].platform == "cpu":
        why = {REMAT: "on a CPU keeping costs copies", GATHERED: "the devices of a CPU share its memory"}
        return _settled(config, least, left, why)
    useless = _useless(config, devices) if GATHERED in left else ""
    if usable is None:
        why = {REMAT: "these devices don't tell their memory"}
        return _settled(config, least, left, why | {GATHERED: useless or why[REMAT]})
    kept = ("dots", "full") if REMAT in left else (remat,)
    copied = (True, False) if GATHERED in left and not useless else (least.gathered,)
    ways = [Way(*way) for way in ((kind, copy) for copy in copied for kind in kept)]
    chosen, said = ways[-1], {}
    for way in ways if len(ways) > 1 else ():  # the last one needs the least
        largest = _most(_with(config, way), devices, account, without_images, usable)
        said[way] = _said(*largest, usable)
        few = way.gathered and _few(_with(config, way), devices, without_images, usable)
        if few:
            said[way] = "beside the copy there is room for few pages"
        elif largest[1] is not None and largest[1] <= usable:
            chosen = way
            break

    def reason(faster: Way) -> str:
        """Of `chosen`, which is the faster way of the two or has taken its place."""
        return said[chosen] if chosen == faster else f"otherwise {said[faster]}; now {said[chosen]}"

    why = {GATHERED: useless}
    if REMAT in left:
        why[REMAT] = reason(chosen._replace(remat="dots"))
    if GATHERED in left and not useless:
        why[GATHERED] = reason(chosen if chosen.gathered else Way(least.remat, True))
    return _settled(config, chosen, left, why)


def of_run(config: ConfigDict, checkpoint: Path, without_images: Sequence[str]) -> Settled:
    """The same for the devices that are here. All processes call it and get the same.

    Args:
        checkpoint: the directory of the model that will be trained.
    """
    source = _copy(config)
    source.checkpoint = str(checkpoint)
    found = settle(source, jax.devices(), Account(account), usable_here(), without_images)
    decided, config = found.config, _with(config, Way(found.config.model.remat, bool(found.config.rollout.gathered)))
    config.rollout.slots, config.rollout.pages = decided.rollout.slots, decided.rollout.pages
    return found._replace(config=config)


def usable_here() -> int | None:
    """Bytes of each device that programs may fill, less the headroom; the least of all processes' devices. None where
    nobody knows. Collective."""
    least = int(distributed.exchange(np.array(min(map(_memory, jax.local_devices())))).min())
    return int(least * (1 - HEADROOM)) or None


def _memory(device: Any) -> int:
    """Bytes that programs may fill: the allocator's limit; without one, as where servers share a GPU, the card's."""
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    cards = [card.memory_bytes for name, card in topologies.GPUS.items() if name.upper() in device.device_kind.upper()]
    return limit or (cards[0] if cards else 0)


def _useless(config: ConfigDict, devices: Sequence[Any]) -> str:
    """Why a copy of the weights would save nothing; "" where it would."""
    if not policy.engine_kind(config).in_process:
        return "servers sample"
    if not any(objectives.of_stage(stage).sampled for stage in schedule.stages(config)):
        return "no stage samples"
    mesh = sharding.make_mesh(config.mesh, devices[: len(config.mesh.gpus) or None])
    if mesh.shape["fsdp"] == 1:
        return "every device row has all weights already"
    return ""


def _most(
    config: ConfigDict, devices: Sequence[Any], account: Account, without_images: Sequence[str], usable: int
) -> tuple[str, int | None]:
    """The program that needs the most, and its bytes; None where the compiler refuses it."""
    found: tuple[str, int | None] = "", 0
    for variant in programs.variants(config, devices, without_images, usable):
        for program in variant.programs:
            size = needed(program, account(config, variant, program))
            if size is None:
                return program.name, None
            found = max(found, (program.name, size), key=lambda one: one[1])
    return found


def _few(config: ConfigDict, devices: Sequence[Any], without_images: Sequence[str], usable: int) -> bool:
    """Whether the sampler's pages hold less than a quarter of the longest response for each slot: most would wait."""
    tokens = config.rollout.max_new_tokens // 4
    slots = [variant.slots for variant in programs.variants(config, devices, without_images, usable)]
    return any(one.rows and one.pool.pages * one.pool.size < one.rows * tokens for one in slots)


def _said(name: str, size: int | None, usable: int) -> str:
    if size is None:
        return f"the compiler finds no room for {name}"
    return f"{name} needs {size / _GIB:,.1f} of {usable / _GIB:,.1f} GiB a device"


def _settled(config: ConfigDict, way: Way, left: set[str], why: dict[str, str]) -> Settled:
    values = {REMAT: way.remat, GATHERED: way.gathered}
    return Settled(_with(config, way), {key: f"{values[key]}: {why[key]}" for key in sorted(left)})


def _with(config: ConfigDict, way: Way) -> ConfigDict:
    copy = _copy(config)
    copy.model.remat, copy.rollout.gathered = way.remat, way.gathered
    return copy


def _copy(config: ConfigDict) -> ConfigDict:
    return config.copy_and_resolve_references()
