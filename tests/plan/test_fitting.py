"""What is chosen where the config leaves it to the memory: made-up programs and memories for every outcome, and the
compiler's account of a tiny run's gradient."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import jax
import pytest

from capcur_jax import presets
from capcur_jax.plan import fitting, programs, topologies
from capcur_jax.plan.fitting import GATHERED, PAGES, REMAT, SLOTS, Way
from capcur_jax.plan.work import Slots
from capcur_jax.rollout.local.places import Pool

GIB = 2**30
DEVICES = [SimpleNamespace(platform="gpu")] * 2
# Bytes that the programs of `made_up` compile to.
SIZES = {("gradient", "dots"): 60, ("gradient", "full"): 30, ("decoding", True): 25, ("decoding", False): 35}
COPY = 16  # of the weights; it lies beside the gradient
PAGE = 2**20  # tokens: few pages are enough for all slots


@pytest.fixture
def config():
    """Of a model on two accelerators, which split it."""
    config = presets.get("qwen3_vl_8b")
    config.order = ("text", "perception")
    config.rollout.update({"slots": 64, "pages": 99})
    return config


@pytest.fixture
def compiles(monkeypatch):
    """settle() of made-up programs; what it compiled."""
    found = []

    def variants(config, devices, without_images, usable):
        resident = COPY * GIB * bool(config.rollout.gathered)
        made = [
            SimpleNamespace(name=name, size=SIZES[name, kind] * GIB, resident=resident * (name == "gradient"), given=0)
            for name, kind in (("gradient", config.model.remat), ("decoding", config.rollout.gathered))
        ]
        slots = Slots(config.rollout.slots, 1, Pool(usable // GIB, PAGE))
        return [SimpleNamespace(stages=[SimpleNamespace(name="text")], programs=made, slots=slots, page_bytes=GIB)]

    def of(variant, program):
        found.append((program.name, program.size // GIB))
        return {"arguments_bytes": 0, "peak_bytes": program.size}

    monkeypatch.setattr(programs, "variants", variants)
    monkeypatch.setattr(fitting.sharding, "make_mesh", lambda *_: SimpleNamespace(shape={"fsdp": 2}))
    found.append(lambda config, usable, devices=DEVICES: fitting.settle(
        config, devices, fitting.Account(of), None if usable is None else int(usable * GIB)
    ))  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("usable", "way", "why"),
    [
        (76, Way("dots", True), {REMAT: "dots: gradient needs 76.0 of", GATHERED: "True: gradient needs 76.0 of"}),
        (
            75,
            Way("full", True),
            {
                REMAT: "full: otherwise gradient needs 76.0 of 75.0 GiB a device; now gradient needs 46.0",
                GATHERED: "True: gradient needs 46.0",
            },
        ),
        # Without the copy dots do not fit either.
        (45, Way("full", False), {REMAT: "full: otherwise gradient needs 60.0", GATHERED: "False: otherwise gradient"}),
        (1, Way("full", False), {REMAT: "full: otherwise", GATHERED: "False: otherwise gradient needs 46.0 of 1.0"}),
    ],
)
def test_the_fastest_way_that_fits(compiles, config, usable, way, why):
    settled = compiles[0](config, usable)
    assert (settled.config.model.remat, settled.config.rollout.gathered) == way
    assert {key: text[: len(why[key])] for key, text in settled.why.items()} == why
    assert (config.model.remat, config.rollout.gathered) == ("auto", None)  # what a run keeps of its config
    assert len(set(compiles[1:])) == len(compiles[1:]) <= 4  # each program once, whatever lies beside it


def test_a_copy_goes_before_dots_and_dots_without_a_copy_before_nothing(compiles, config, monkeypatch):
    """Decoding that the copy leaves no room for."""
    monkeypatch.setitem(SIZES, ("decoding", True), 70)
    settled = compiles[0](config, 65)
    assert (settled.config.model.remat, settled.config.rollout.gathered) == Way("dots", False)
    assert settled.why[GATHERED].startswith("False: otherwise decoding needs 70.0 of 65.0")
    assert settled.why[REMAT] == "dots: gradient needs 60.0 of 65.0 GiB a device"


def test_what_is_set_stays(compiles, config):
    config.model.remat = "dots"
    settled = compiles[0](config, 65)
    assert (settled.config.model.remat, settled.config.rollout.gathered) == Way("dots", False)
    assert list(settled.why) == [GATHERED]
    config.rollout.gathered = True
    assert compiles[0](config, 1) == (config, {})
    config.model.remat = "none"
    assert compiles[0](config, 1) == (config, {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rollout.engine": "sglang"}, "False: servers sample"),
        ({"fsdp": 1}, "False: every device row has all weights already"),
        ({"stages.text.objective": "sft", "stages.perception.objective": "sft"}, "False: no stage samples"),
    ],
)
def test_a_copy_where_it_saves_something(compiles, config, monkeypatch, change, why):
    shape = {"fsdp": change.pop("fsdp", 2)}
    monkeypatch.setattr(fitting.sharding, "make_mesh", lambda *_: SimpleNamespace(shape=shape))
    config.update_from_flattened_dict(change)
    settled = compiles[0](config, 80)
    assert settled.config.model.remat == "dots" and settled.why[GATHERED].startswith(why)


def test_pages_fill_what_is_left_and_a_step_s_responses_have_slots(compiles, config, monkeypatch):
    monkeypatch.setattr(fitting.sharding, "make_mesh", lambda *_: SimpleNamespace(shape={"fsdp": 2, "data": 1}))
    config.rollout.update({"slots": 0, "pages": 0})
    settled = compiles[0](config, 80)
    assert (settled.config.rollout.slots, settled.config.rollout.pages) == (2 * fitting.MOST, 80)
    assert settled.why[SLOTS] == "640: 320 of a device row"
    assert settled.why[PAGES] == f"80: pages of {PAGE} tokens, of each device row"
    config.stages.text.prompts = config.stages.perception.prompts = 16
    assert compiles[0](config, 80).why[SLOTS] == "80: all responses of a step"
    config.rollout.engine = "sglang"
    assert not {SLOTS, PAGES} & compiles[0](config, 80).why.keys()


def test_a_copy_that_leaves_few_pages_is_not_made(compiles, config, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PAGE", 128)  # 64 slots would have 80 x 128 tokens
    settled = compiles[0](config, 80)
    assert not settled.config.rollout.gathered
    assert settled.why[GATHERED].startswith(
        "False: otherwise beside the copy there is room for few pages; now gradient"
    )


def test_what_the_sampler_makes_takes_room_from_its_pages(compiles, config, monkeypatch):
    config.rollout.update({"pages": 0, "gathered": False})
    config.model.remat = "full"
    monkeypatch.setitem(SIZES, ("decoding", False), 82)
    assert compiles[0](config, 80).config.rollout.pages == 78
    # Never fewer than a prompt and a response need: that the sampler then has no room is what a plan is to say.
    monkeypatch.setattr(sys.modules[__name__], "PAGE", 1024)
    monkeypatch.setitem(SIZES, ("decoding", False), 300)
    assert compiles[0](config, 80).config.rollout.pages == (2048 + 2048) // 1024


def test_a_refusal_of_the_compiler_is_no_room(config, monkeypatch, compiles):
    def of(variant, program):
        full = program.size == SIZES["gradient", "full"] * GIB or program.name == "decoding"
        return {"arguments_bytes": 0, "peak_bytes": program.size} if full else {"out_of_memory": "12G of 8G"}

    settled = fitting.settle(config, DEVICES, fitting.Account(of), 50 * GIB)
    assert settled.why[REMAT].startswith("full: otherwise the compiler finds no room for gradient; now gradient needs")


def test_where_nothing_tells_the_memory_the_least_is_taken_and_nothing_compiled(compiles, config):
    settle = compiles[0]
    for devices, usable, why in (
        (DEVICES, None, "full: these devices don't tell their memory"),
        ([SimpleNamespace(platform="cpu")], 100, "full: on a CPU keeping costs copies"),
    ):
        settled = settle(config, usable, devices)
        assert (settled.config.model.remat, settled.config.rollout.gathered) == Way("full", False)
        assert settled.why[REMAT] == why and settled.why[GATHERED].startswith("False: ")
    assert len(compiles) == 1


def test_the_memory_of_these_devices(monkeypatch):
    assert fitting.usable_here() is None  # a CPU's don't tell
    limits = [{"bytes_limit": 80}, {"bytes_limit": 100}]
    kinds = dict(device_kind="an accelerator")
    monkeypatch.setattr(
        jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda one=one: one, **kinds) for one in limits]
    )
    assert fitting.usable_here() == 72
    monkeypatch.setattr(fitting.distributed, "exchange", lambda value: value * [[1.0], [0.5]])  # of another process
    assert fitting.usable_here() == 36
    limits[:] = [None]
    assert fitting.usable_here() is None
    kinds["device_kind"] = "NVIDIA H100 80GB HBM3"  # that says nothing: the card's, of which the other has half
    assert fitting.usable_here() == int(topologies.GPUS["h100"].memory_bytes // 2 * 0.9)


def test_dots_need_more_than_full_by_the_compilers_account():
    """The gradient of the laptop run's text stage."""
    config = presets.get("laptop")
    config.order = ("text",)
    sizes = {}
    for remat in ("full", "dots"):
        config.model.remat = remat
        (variant,) = programs.variants(config, jax.devices()[:1], ("text",))
        gradient = next(program for program in variant.programs if program.name == "gradient")
        sizes[remat] = fitting.needed(gradient, fitting.account(variant, gradient))
    assert sizes["full"] < sizes["dots"]
