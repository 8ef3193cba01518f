"""Phases of a tiny run's step at made-up rates, against numbers worked out from its shapes."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from capcur_jax import presets
from capcur_jax.models.batching import PromptSize
from capcur_jax.plan import phases, rates, topologies, work
from capcur_jax.plan import programs as plan_programs
from capcur_jax.rollout.local.places import Pool

CHIP = topologies.Chip(memory_bytes=2**40, flops=1e12, bandwidth=1e9, link=1e9, network=1e9)
RATES = rates.of(topologies.parse("cuda:h200:1x1x1"))
GROUPS = [(PromptSize(30 + i), [4, 6, 10, 20, 40]) for i in range(16)]


@pytest.fixture(scope="module")
def variant():
    """The laptop run's text stage on one device: 16 prompts a step, two updates."""
    config = presets.get("laptop")
    with config.unlocked():
        config.order, config.objective.updates_per_batch, config.model.remat = ("text",), 2, "none"
        config.stages.text.prompts = 16
    (found,) = plan_programs.variants(config, jax.devices()[:1], ("text",))
    return config, found


@pytest.fixture(scope="module")
def step(variant):
    config, found = variant
    program = {
        "sent_bytes": 3.3e9, "kernels": ["__cudnn$fmhaSoftmax"], "moved_bytes": 8e6, "moved_bytes_a_turn": 4e9,
        "collectives_a_turn": 0, "arguments_bytes": 3e9, "outputs_bytes": 1e9, "flops": 48e6,
    }  # fmt: skip
    measured = dict.fromkeys((p.name for p in found.programs), program)
    return phases.Step(config, found, measured, RATES, CHIP, 1).of(GROUPS)


def sampled_by(found) -> work.Sampled:
    return work.sampled(GROUPS, found.layout.buckets, 1, found.slots, 48, False)


def by_name(step) -> dict[str, phases.Phase]:
    return {phase.phase: phase for phase in step[0]}


def test_runs_are_those_of_the_trainer_and_the_sampler(variant, step):
    config, found = variant
    known, sampled = by_name(step), sampled_by(found)
    assert known["prefill"].runs == len(sampled.admissions) == step[1]["admissions"]
    assert known["decode"].runs == sampled.steps == step[1]["decode_steps"] >= 39
    micros = [micro for update in work.updates(GROUPS, found.layout) for micro in update]
    assert known["gradient"].runs == known["reference"].runs == len(micros)
    assert known["old"].runs == len(micros) // 2  # the first update trains its own old policy
    real = sum(size.tokens + sum(responses) for size, responses in GROUPS)
    computed = sum(micro.shape.length for micro in micros)
    assert known["gradient"].tokens == (computed, real) and step[1]["padding_text"] == pytest.approx(
        1 - real / computed
    )
    assert known["decode"].tokens == (sum(rows * steps for rows, steps in sampled.bursts), 16 * 80)
    assert config.rollout.group == 5


def test_seconds_follow_from_the_rates(variant, step):
    text, known = variant[1].layout.processor.config.text, by_name(step)
    decode, runs = known["decode"], known["decode"].runs
    # What a turn moves, and of the pages what is live: float32 keys and values of every layer.
    sampled = sampled_by(variant[1])
    live = sampled.live * 2 * text.depth * text.kv_heads * text.head_dim * 4
    assert decode.seconds_by["memory"] == pytest.approx((runs * 4e9 + live) / RATES.memory)
    assert decode.seconds_by["launch"] == pytest.approx(runs * RATES.turn)
    assert decode.bytes_a_turn == int(4e9 + live / runs)
    bursts = len(sampled.bursts)
    assert decode.seconds_by["between bursts"] == pytest.approx(bursts * (RATES.launch + 8e6 / RATES.memory))
    assert known["optimizer"].seconds == pytest.approx(2 * 4e9 / RATES.memory)
    assert known["host"].seconds_by["grading"] == 0  # decoding takes longer
    reference, gradient = known["reference"], known["gradient"]
    # Linear layers once, and three times (logits once more, they are not kept).
    micros = [micro for update in work.updates(GROUPS, variant[1].layout) for micro in update]
    expected = 0.0
    for micro in micros:
        weights = work.layer_parameters(variant[1].layout.processor.config) + text.width * text.vocabulary
        expected += 2 * work.tokens(micro) * weights / RATES.linear
    assert reference.seconds_by["layers"] == pytest.approx(expected)
    assert 3 * expected < gradient.seconds_by["layers"] < 4 * expected
    pairs = sum(map(work.pairs, micros)) * work.pair_flops(variant[1].layout.processor.config)
    attention = RATES.attention
    assert reference.seconds_by["attention"] == pytest.approx(pairs / attention.forward)
    once_and_back = pairs * (1 / attention.forward + rates.BACKWARD / attention.backward)
    assert gradient.seconds_by["attention"] == pytest.approx(once_and_back)
    assert gradient.seconds_by["sends"] == pytest.approx(len(micros) * 0.01 * RATES.exposed_gradient)


def test_the_steps_figures_are_sums_of_its_phases(variant, step):
    known, figures = by_name(step), step[1]
    assert figures["step_seconds"] == pytest.approx(sum(phase.seconds for phase in step[0]))
    trainer = sum(known[name].seconds for name in ("old", "reference", "gradient", "optimizer"))
    assert figures["trainer_seconds"] == pytest.approx(trainer)
    config, useful = variant[1].layout.processor.config, work.useful(GROUPS)
    forward = work.linear_flops(config, useful) + useful.pairs * work.pair_flops(config)
    assert figures["mfu"] == pytest.approx(5.5 * forward / (figures["step_seconds"] * 1e12))
    parameters = work.layer_parameters(config) + 2 * config.text.width * config.text.vocabulary
    seconds = known["gradient"].seconds
    assert figures["mfu_easyr1"] == pytest.approx(6 * parameters * useful.full / (seconds * 1e12))
    record = known["gradient"].record()
    assert record["tokens"]["real"] == useful.tokens and record["bound_by"] == "launch"


def test_rates_of_other_chips_are_in_proportion_to_their_peaks():
    b200 = rates.of(topologies.parse("cuda:b200:1x1x1"))
    assert b200.linear / RATES.linear == pytest.approx(2250 / 989.4) == b200.images.backward / RATES.images.backward
    assert b200.memory / RATES.memory == pytest.approx(7672 / 4800) and b200.link / RATES.link == 2
    assert rates.of(topologies.parse("tpu:v5p:2x2x1")).linear == 275e12


def test_servers_have_a_model_of_their_own(variant, monkeypatch):
    """Without the local sampler: their devices, waves of prompts, weights through the host."""
    config, found = variant
    servers = SimpleNamespace(in_process=False)
    monkeypatch.setattr(phases.policy, "engine_kind", lambda config: servers)
    program = {"sent_bytes": 0, "kernels": [], "arguments_bytes": 1, "outputs_bytes": 1}
    measured = dict.fromkeys((p.name for p in found.programs), program)
    step = phases.Step(config, found._replace(slots=work.Slots(0, 0, Pool(0, 0))), measured, RATES, CHIP, 3).of(GROUPS)
    known = by_name(step)
    assert known["decode"].runs == 40 and step[1]["admissions"] == 0
    assert known["weights"].seconds == pytest.approx(found.weight_bytes / rates.HOST.served)
