"""Names of topologies, the facts about their chips, what is said when a compiler is missing."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from capcur_jax.errors import InputError
from capcur_jax.plan import topologies


def in_a_process_of_its_own(code: str, *arguments: str) -> str:
    """stdout of `code`: topologies are to be asked for before jax has started."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("name", "platform", "chip", "layout"), [
    ("cpu:8", "cpu", "", (8,)), ("tpu:v5p:2x2x2", "tpu", "v5p", (2, 2, 2)), ("tpu:v6e:4x4", "tpu", "v6e", (4, 4)),
    ("tpu:tpu7x:2x2x1", "tpu", "tpu7x", (2, 2, 1)), ("cuda:h200:1x1x8", "cuda", "h200", (1, 1, 8)),
])  # fmt: skip
def test_names(name, platform, chip, layout):
    topology = topologies.parse(name)
    assert topology == (name, platform, chip, layout)
    assert (topology.facts is None) == (platform == "cpu")


@pytest.mark.parametrize(
    "name",
    ["", "cpu", "cpu:", "cpu:0", "cpu:2x4", "cpu:fast:8", "tpu:v5p:2x2", "tpu:v5p:2x2x", "tpu:v4:2x2x1",
     "tpu:h200:2x2x2", "v5p:2x2x2", "cuda:h200:8", "cuda:a100:1x1x8", "cuda:h200:1x1x8 "],
)  # fmt: skip
def test_an_unknown_topology_is_refused_with_those_there_are(name):
    with pytest.raises(
        InputError, match=r"is unknown: give cpu:8, .*tpu:v5p:2x2x2, .*h100, h200, b200 .cuda:h200:1x1x8"
    ):
        topologies.parse(name)


def test_missing_compilers_are_named(monkeypatch):
    there = {"libtpu", "nvidia"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name in there else None)
    assert topologies.missing("tpu") == topologies.missing("cpu") == []
    message = r"needs jax-cuda12-plugin and nvidia-cudnn-cu12: pip install 'capcur_jax\[plan\]'"
    with pytest.raises(InputError, match=message):
        topologies.devices("cuda:h200:1x1x8")
    there.clear()
    with pytest.raises(InputError, match="needs libtpu: "):
        topologies.devices("tpu:v5p:2x2x2")


def test_cpu_devices_are_as_many_as_asked_for():
    code = """if True:
        from capcur_jax.plan import topologies
        import jax
        print(len(topologies.devices("cpu:6")), len(jax.devices()))
        try:
            topologies.devices("cpu:7")
        except Exception as error:
            print(type(error).__name__, error)
    """
    first, second = in_a_process_of_its_own(code).splitlines()
    assert first == "6 6"
    assert second.startswith("InputError topology 'cpu:7': jax_num_cpu_devices")


@pytest.mark.parametrize(("name", "count", "kind"), [
    ("tpu:v5p:2x2x2", 8, "TPU v5"), ("tpu:v6e:4x4", 16, "TPU v6 lite"),
    ("cuda:h200:2x1x4", 8, "NVIDIA H200 141GB HBM3e"),
])  # fmt: skip
def test_devices_that_are_not_there(name, count, kind):
    if topologies.missing(topologies.parse(name).platform, kernels=False):
        pytest.skip("its compiler is not installed (extra test, on Linux x86-64)")
    code = """if True:
        import sys
        from capcur_jax.plan import topologies
        found = topologies.devices(sys.argv[1], kernels=False)
        print(len(found), found[0].device_kind)
    """
    assert in_a_process_of_its_own(code, name).strip() == f"{count} {kind}"


@pytest.mark.parametrize("chip", topologies.TPUS)
def test_a_tpus_memory_is_what_its_compiler_says(chip):
    """An array that fits no chip: the compiler says how much there is."""
    if topologies.missing("tpu"):
        pytest.skip("its compiler is not installed (extra test, on Linux x86-64)")
    code = """if True:
        import sys
        from capcur_jax.plan import topologies
        import jax
        sharding = jax.sharding.SingleDeviceSharding(topologies.devices(sys.argv[1])[0])
        array = jax.ShapeDtypeStruct((75, 2**20, 256), jax.numpy.float32, sharding=sharding)
        try:
            jax.jit(lambda x: 2 * x).lower(array).compile()
        except Exception as error:
            print(str(error).partition("available HBM (")[2].partition("G)")[0])
    """
    name = f"tpu:{chip}:" + ("2x2" if chip in ("v5e", "v6e") else "2x2x1")
    assert int(float(in_a_process_of_its_own(code, name)) * 2**30) == topologies.TPUS[chip].memory_bytes
