"""The plan of a tiny run against sizes worked out from its shapes; its verdict and estimate against made-up chips; what
the command says and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from capcur_jax import policy, presets
from capcur_jax.models.config import from_directory
from capcur_jax.plan import __main__ as plan
from capcur_jax.plan import estimate, topologies
from capcur_jax.plan import programs as plan_programs
from tests.plan.test_lengths import recorded

QUICK = (
    "--config.model.remat=none",
    "--config.objective.updates_per_batch=2",
)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "capcur_jax.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


# ---------------------------------------------------------------------- a tiny run


@pytest.fixture(scope="module")
def tiny():
    """The laptop run's text stage on two virtual devices, fsdp."""
    one = "--config.order=('text',)", "--config.stages.text.prompts=16"
    done = run("--config=configs/staged.py", "--topology=cpu:2", "--json", *one, *QUICK)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def programs(tiny) -> dict[str, dict]:
    (stage,) = tiny["stages"]
    return {program["name"]: program for program in stage["programs"]}


def test_what_is_compiled_and_how_often_a_step_runs_it(tiny):
    (stage,) = tiny["stages"]
    assert (stage["stages"], stage["mesh"], stage["images"]) == (["text"], {"data": 1, "fsdp": 2, "tensor": 1}, False)
    times = {name: program["runs_a_step"] for name, program in programs(tiny).items()}
    # The first update of two trains its own old policy, and has no pass for it.
    # Eight of the largest groups, of 336 tokens, on two device rows: two of them in each of two packed rows.
    updated = {"reference log-probs": 4, "old log-probs": 2, "gradient": 4, "update": 2}
    assert times == updated | {"prefill": 1, "decoding": 1}
    assert stage["shapes"]["tokens of a response"] == 48
    assert stage["shapes"]["tokens of a packed row"] == max(presets.laptop().packing.shapes)[0]
    assert stage["shapes"]["attention of packed rows"].startswith("group after group (no kernel for cpu")


def test_bytes_follow_from_the_parameters(tiny):
    """Float32 throughout; the frozen tower has neither gradient nor moments. What two devices split is half on each."""
    (stage,) = tiny["stages"]
    known = programs(tiny)
    update, gradient, score = known["update"], known["gradient"], known["old log-probs"]
    trained = update["arguments_bytes"] / 4  # parameters, two moments, gradients
    everything = 4 * stage["parameters"] / 2
    frozen = update["resident_bytes"] - 2 * trained  # and the reference and the sampler's copy of the decoder
    assert trained + frozen == pytest.approx(everything, rel=0.05)  # norms and biases lie whole on both
    assert 0 < frozen < everything
    # Without images nothing uses the frozen tower: it is no argument, but it lies there.
    assert score["arguments_bytes"] == pytest.approx(trained, rel=0.05)
    assert gradient["arguments_bytes"] == pytest.approx(2 * trained, rel=0.05)
    for program in (score, gradient):
        beside = program["needed_bytes"] - program["peak_bytes"] - program["resident_bytes"]
        assert beside == pytest.approx(frozen, rel=0.05)
    # Beside a gradient: both moments, the reference and the sampler's copy of the decoder, which is what is trained;
    # beside the sampler gradients, too, and what its program does not read.
    assert gradient["resident_bytes"] == pytest.approx(4 * trained, rel=0.05)
    assert known["prefill"]["resident_bytes"] == pytest.approx(5 * trained, rel=0.01)
    assert known["decoding"]["resident_bytes"] == pytest.approx(4 * trained + everything, rel=0.01)
    # Of a device: 40 slots with a page of 96 + 48 keys and values each, and what they have drawn.
    text = from_directory(presets.TINY_CHECKPOINT).text
    cache = 40 * (96 + 48) * 2 * text.depth * text.kv_heads * text.head_dim * 4
    assert known["decoding"]["outputs_bytes"] == pytest.approx(cache + 40 * (8 * 48 + 4), rel=0.01)
    assert known["decoding"]["aliases_bytes"] == cache  # nothing is copied
    assert known["reference log-probs"]["resident_bytes"] == pytest.approx(5 * trained, rel=0.05)
    for program in known.values():
        sizes = (program[f"{name}_bytes"] for name in ("arguments", "outputs", "temp", "aliases"))
        arguments, outputs, temp, aliases = sizes
        assert program["peak_bytes"] >= arguments + outputs + temp - aliases
    assert tiny["peak_bytes"] == max(program["needed_bytes"] for program in known.values())


def test_flops_are_those_of_the_shapes(tiny):
    """Linear layers and logits of two packed rows, attention over [prompt | own] of all groups that they may hold."""
    config, text = presets.get("laptop"), from_directory(presets.TINY_CHECKPOINT).text
    tokens, groups = 2 * max(config.packing.shapes)[0], 2 * config.packing.groups
    G, S, T = 5, 96, 48
    heads, kv = text.heads * text.head_dim, text.kv_heads * text.head_dim
    layer = text.width * (2 * heads + 2 * kv + 3 * text.mlp_width)
    attention = 2 * text.depth * 2 * heads * groups * (S * S + G * T * (S + T))
    logits = 2 * tokens * text.width * text.vocabulary
    forward = 2 * text.depth * tokens * layer + attention + logits
    known = programs(tiny)
    assert known["old log-probs"]["flops"] == known["reference log-probs"]["flops"] == forward
    # Backwards twice; logits and attention once more (they are not kept).
    assert known["gradient"]["flops"] == 3 * forward + logits + attention
    token = layer + 2 * heads * (S + T) + text.width * text.vocabulary // text.depth
    assert known["decoding"]["flops"] == pytest.approx(2 * text.depth * token * 80 * T, rel=0.01)
    assert tiny["stages"][0]["step"]["flops"] == sum(p["flops"] * p["runs_a_step"] for p in known.values())


def test_parameters_are_gathered_and_gradients_scattered(tiny):
    kinds = {c["kind"] for c in programs(tiny)["gradient"]["collectives"]}
    assert "all-gather" in kinds and kinds & {"reduce-scatter", "all-reduce"}
    assert programs(tiny)["gradient"]["sent_bytes"] > 0


@pytest.mark.parametrize(("kind", "sampling"), [("sglang", ()), ("local", plan_programs.SAMPLING)])
def test_servers_sample_on_their_own_and_the_trainer_takes_its_gpus(kind, sampling, monkeypatch):
    monkeypatch.setitem(policy.ENGINES, "another", policy.ENGINES[kind])
    config = presets.get("laptop")
    with config.unlocked():
        config.rollout.engine, config.mesh.gpus = "another", (0,)
    config.objective.updates_per_batch = 1
    (variant, *_) = plan_programs.variants(config, jax.devices() * 2, ())
    assert [program.name for program in variant.programs] == ["reference log-probs", "gradient", "update", *sampling]
    assert variant.mesh.size == 1


def test_where_others_sample_the_plan_says_what_it_leaves_out(tiny, capsys):
    assert tiny["samples_in_process"]
    for here in (True, False):
        plan.render(tiny | {"rollout_engine": "another", "samples_in_process": here})
        assert ("servers sample" in capsys.readouterr().out) != here


def test_a_cpu_gets_no_verdict_and_says_what_it_is_good_for(tiny, capsys):
    assert "fits" not in tiny and "estimate" not in tiny and tiny["chip"] is None
    assert tiny["decided"] == {"rollout.gathered": "False: the devices of a CPU share its memory"}
    assert tiny["versions"]["jax"] == jax.__version__
    plan.render(tiny)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Virtual CPU devices are for numerics" in shown
    assert "tokens of a packed row 1216" in shown and "old log-probs" in shown and "Fits" not in shown


# ---------------------------------------------------------------------- verdict and estimate

CHIP = topologies.Chip(memory_bytes=2**20, flops=1e9, bandwidth=1e6, link=1e5, network=1e4)


def program(size: int, **values):
    """x @ x of [size, size] float32, one run."""
    array = jax.ShapeDtypeStruct((size, size), jnp.float32)
    trace = lambda: jax.jit(lambda x: x @ x).trace(array)  # noqa: E731
    known = {"trace": trace, "name": "square", "times": 1, "given": 0, "resident": 0, "turns": 0}
    return SimpleNamespace(**(known | values))


def test_what_fits_with_what_lies_there_and_the_headroom():
    needed = 2 * 4 * 128**2  # argument and result
    room = CHIP.memory_bytes * 0.75

    def fits(resident):
        return estimate.measure(program(128, resident=int(resident)), CHIP, 0.25)["fits"]

    measured = estimate.measure(program(128), CHIP, 0.25)
    assert measured["peak_bytes"] >= needed and measured["flops"] == 2 * 128**3
    assert fits(room - measured["peak_bytes"])
    assert not fits(room - measured["peak_bytes"] + 1)


def test_an_out_of_memory_error_of_the_compiler_is_a_verdict():
    class Lowered:
        def compile(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM (12G of 8G)\nmore")

    traced = SimpleNamespace(lower=Lowered, jaxpr=jax.make_jaxpr(lambda x: x)(1.0))
    what = program(8, trace=lambda: traced)
    measured = estimate.measure(what, CHIP, 0.1)
    assert measured["fits"] is False and measured["out_of_memory"] == "Ran out of memory on HBM (12G of 8G)"


LENGTHS = ["name", "step_seconds", "rollout_seconds", "trainer_seconds", "weights_seconds", "host_seconds", "mfu",
           "mfu_easyr1", "padding_text", "padding_patches", "decode_steps", "admissions", "device_hours"]  # fmt: skip


@pytest.mark.parametrize(
    ("topology", "attention"), [("cuda:h200:1x1x2", "xla"), ("cuda:h100:1x1x2", "auto"), ("tpu:v5p:2x2x1", "auto")]
)
def test_a_tiny_run_on_accelerators(topology, attention, tmp_path):
    """With XLA's attention a GPU's programs need no cuDNN. Lengths are those of a record of eight groups."""
    if lacking := topologies.missing(topologies.parse(topology).platform, kernels=attention != "xla"):
        pytest.skip(f"{' and '.join(lacking)} not installed")
    settings = ("--config.order=('text',)", "--config.model.dtype=bfloat16", *QUICK)
    settings += (f"--config.model.attention={attention}",)
    left = topology.startswith("cuda:h200")  # to the memory, of which there is more than enough
    settings += ("--config.model.remat=auto",) if left else ("--config.rollout.gathered=False",)
    groups = [(30 + i, [4, 6, 10, 20, 40]) for i in range(8)]
    lengths, other = recorded(tmp_path / "rollouts.jsonl", groups), tmp_path / "other.jsonl"
    recorded(other, [(30, [4] * 5)] * 8)
    done = run(
        "--config=configs/staged.py", f"--topology={topology}", "--json", f"--lengths={lengths},{other}", *settings
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"] and list(found)[-1] == "lengths" and list(found["lengths"]) == LENGTHS
    (others,) = found["others"]
    assert list(others) == LENGTHS and others["name"] == str(other)
    assert 0 < others["decode_steps"] < found["lengths"]["decode_steps"]
    (stage,), of = found["stages"], found["lengths"]
    assert stage["phases"] and all(program["kernels"] is not None for program in stage["programs"])
    by = {phase["phase"]: phase for phase in stage["phases"]}
    assert list(by) == ["prefill", "decode", "old", "reference", "gradient", "optimizer", "weights", "host"]
    assert sum(phase["seconds"] for phase in by.values()) == pytest.approx(of["step_seconds"])
    assert stage["shapes"]["tokens of a packed row"] == 1280  # 1216 as declared, in whole tiles
    prompts, responses = stage["shapes"]["prompts of a step"], by["decode"]["tokens"]["real"]
    assert responses == prompts * 80 and by["prefill"]["tokens"]["real"] == pytest.approx(33.5 * prompts, rel=0.05)
    assert by["decode"]["runs"] == of["decode_steps"] and 0 < of["padding_text"] < 1 and of["padding_patches"] == 0
    assert by["old"]["runs"] == 1 and by["gradient"]["runs"] == 2
    # A turn of decoding reads at least all weights of the decoder and its cache.
    text = from_directory(presets.TINY_CHECKPOINT).text
    rows, heads = 40, text.kv_heads * text.head_dim
    cache = rows * (96 + 48) * 2 * text.depth * heads * 2
    assert by["decode"]["bytes_a_turn"] > cache + text.width * text.vocabulary * 2
    decoding = next(program for program in stage["programs"] if program["name"] == "decoding")
    assert decoding["loops_of_unknown_length"] == 0
    if left:
        assert {key: why.partition(":")[0] for key, why in found["decided"].items()} == {
            "model.remat": "dots", "rollout.gathered": "True", "rollout.pages": "80",
        }  # fmt: skip
        assert by["weights"]["seconds"] > 0
    else:
        assert list(found["decided"]) == ["rollout.pages"]
    # Without a copy weights are gathered for each token.
    assert (decoding["sent_bytes"] / 48 > text.depth * text.width * text.mlp_width) != left
    low, high = stage["estimate"]["seconds_a_step"]
    assert low < of["step_seconds"] < high


# ---------------------------------------------------------------------- command line


@pytest.mark.parametrize(("arguments", "message"), [
    (("--topology=cpu:1",), "--config is missing"),
    (("--config=configs/staged.py",), "--topology is missing"),
    (("--config=configs/staged.py", "--topology=tpu:v9:2x2"), "topology 'tpu:v9:2x2' is unknown"),
    (("--config=configs/staged.py", "--topology=cpu:1", "--config.sed=1"), "the config has no such key"),
    (
        ("--config=configs/staged.py", "--topology=cpu:1", "--config.rollout.sglang.router=python"),
        "config.rollout.sglang.router was removed",
    ),
    (("--config=configs/staged.py", "--topology=cpu:1", "--headroom=2"), "--headroom=2"),
    (("--utilisation=0.4",), "--utilisation was removed: the rates of capcur_jax/plan/rates.py"),
    (("--bandwidth_utilisation", "0.5"), "--bandwidth_utilisation was removed: the rates"),
    (("--config=configs/staged.py", "--topology=cpu:1", "--lengths=paper"), "a CPU's devices have no rates"),
    (("--config=configs/staged.py", "--topology=cuda:h200:1x1x1", "--lengths=papers"), "neither one of paper, "),
    (("--config=configs/staged.py", "--topology=cpu:1", "extra"), "unknown argument 'extra'"),
    (("--config=configs/staged.py", "--topology=cpu:1", "--config.checkpoint="), "give --config.checkpoint=DIR, or"),
    (
        ("--config=configs/staged.py", "--topology=cpu:2", "--config.mesh.gpus=(0,1,2)"),
        "config.mesh.gpus = (0, 1, 2): the topology has 2 devices",
    ),
    (("--config=configs/staged.py", "--topology=cpu:3"), "can't be split into"),
    (
        ("--config=configs/staged.py", "--topology=cpu:1", "--config.stages.text.objective=ppo"),
        "config.stages.text.objective = 'ppo'; choose one of grpo, sft",
    ),
])  # fmt: skip
def test_what_cannot_be_used_is_exit_code_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(
        topologies, "devices", lambda name, kernels: jax.devices()[:1] * topologies.parse(name).layout[-1]
    )
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])  # where ml_collections looks for settings
    assert plan.main(sys.argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and message in said.err


def test_a_config_file_that_unlocks_itself_for_a_deleted_key_is_told_what_to_use(tmp_path, capsys, monkeypatch):
    (tmp_path / "old.py").write_text(
        "from capcur_jax import presets\n\n\ndef get_config():\n    config = presets.get('laptop')\n"
        "    with config.unlocked():\n        config.packing.lengths = (960,)\n    return config\n"
    )
    monkeypatch.setattr(sys, "argv", ["plan", f"--config={tmp_path / 'old.py'}", "--topology=cpu:1"])
    assert plan.main(sys.argv) == 2
    assert "config.packing.lengths was removed" in (said := capsys.readouterr().err) and "config.packing.shapes" in said
