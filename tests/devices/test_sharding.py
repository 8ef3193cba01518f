"""Results do not depend on the layout: one recorded rollout batch, replayed on one device, on meshes of eight virtual
ones, and by two processes, gives the same losses, gradients (as moments) and parameters."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.models import config as config_lib
from capcur_jax.models import published
from capcur_jax.models.qwen_vl import QwenVL
from tests import environment
from tests.test_main import ROOT

LAYOUTS = {
    "data 2 x fsdp 2 x tensor 2": (2, 2, 2, 512),
    "fsdp 8": (1, 8, 1, 256),
    "fsdp 4 x tensor 2, two micro-batches": (1, 4, 2, 256),
}


def start(checkpoint, layout: tuple[int, ...], devices: int, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.devices.replay", str(checkpoint), *map(str, layout)]
    variables = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def report(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=300)
    lines = [line.removeprefix("REPORT ") for line in output.splitlines() if line.startswith("REPORT ")]
    assert process.returncode == 0 and lines, errors[-3000:]
    return json.loads(lines[0])


def assert_same(ours: dict, theirs: dict) -> None:
    for mine, other in zip(ours["updates"], theirs["updates"], strict=True):
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=2e-5, abs=2e-5), name
    for what in ("moments", "parameters"):
        for name, (*projections, square) in theirs[what].items():
            for mine, other in zip(ours[what][name], (*projections, square), strict=True):
                assert abs(mine - other) <= 1e-4 * math.sqrt(square) + 1e-4 * square, (what, name)


@pytest.fixture(scope="module")
def alone(checkpoint):
    """Two updates on one device, each one micro-batch."""
    return report(start(checkpoint, (1, 1, 1, 1536, 2), 1))


@pytest.mark.e2e
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_mesh_changes_nothing(checkpoint, alone, layout):
    ours = report(start(checkpoint, (*layout, 2), 8))
    assert ours["devices"] == 8 and alone["devices"] == 1
    assert_same(ours, alone)
    assert ours["greedy"] == alone["greedy"]  # the local engine on the same mesh


@pytest.mark.e2e
def test_the_replay_moves_everything(alone):
    """What is compared is not a stand-still: every parameter has moved, and the second update saw another policy."""
    first, second = alone["updates"]
    assert second["kl"] > 0 and first["kl"] == 0 and first["grad_norm"] > 0.1
    assert all(square > 0 for *_, square in alone["moments"].values())


@pytest.mark.e2e
def test_two_processes_change_nothing(checkpoint, alone):
    """Each reads its own share of the prompts, samples and trains on two devices of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", **environment.TOGETHER}
    started = [start(checkpoint, (2, 2, 1, 512, 2), 2, JAX_PROCESS_ID=str(i), **shared) for i in range(2)]
    first, second = map(report, started)
    assert first["devices"] == 4 and first["updates"] == second["updates"]
    assert_same(first, alone)
    assert not set(first["greedy"]) & set(second["greedy"])
    assert first["greedy"] | second["greedy"] == alone["greedy"]


@pytest.mark.e2e
def test_windows_and_a_head_of_its_own(windowed_untied_checkpoint):
    """Qwen2.5-VL; one kv head, which no tensor axis splits, so parameters over four devices alone."""
    ours = report(start(windowed_untied_checkpoint, (1, 4, 1, 512, 1), 4))
    assert_same(ours, report(start(windowed_untied_checkpoint, (1, 1, 1, 1536, 1), 1)))


# ---------------------------------------------------------------------- rules and meshes


@pytest.mark.parametrize("name", published.NAMES)
def test_every_large_parameter_of_a_published_model_is_split(name):
    """Over fsdp 4 x tensor 4: nothing that weighs is left whole on every device."""
    config = config_lib.from_dict(published.config(name))
    state = nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    mesh, whole, split = AbstractMesh((1, 4, 4), sharding.AXES), 0, 0
    for path, leaf in nnx.to_flat_state(state):
        spec = sharding.spec_of(mesh, ".".join(map(str, path)), leaf.shape)
        shards = math.prod(mesh.shape[axis] for axis in spec if axis)
        whole += leaf.size
        split += leaf.size / shards
        if leaf.size > 2**24:
            assert shards == 16 or "qkv" in path, (path, spec)
    assert split < whole / 16 * 1.25


def test_a_dimension_that_does_not_divide_is_whole():
    mesh = AbstractMesh((1, 4, 8), sharding.AXES)
    assert sharding.spec_of(mesh, "visual.blocks.down.kernel", (32, 3420, 1280)) == P(None, None, "fsdp")
    assert sharding.spec_of(mesh, "text.layers.o.kernel", (2, 64, 32)) == P(None, "tensor", "fsdp")
    assert sharding.spec_of(mesh, "text.norm.scale", (32,)) == P(None)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, -1, -1), "one axis at most"),
        ((0, 1, 1), "at least 1"),
        ((3, 1, 1), "do not make the 1 devices"),
        ((1, 2, -1), "do not make"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_input_error(sizes, message):
    with pytest.raises(InputError, match=message) as caught:
        sharding.make_mesh(ConfigDict(dict(zip(sharding.AXES, sizes, strict=True))), jax.devices()[:1])
    assert "config.mesh.data" in str(caught.value)


def test_one_device_is_a_mesh(checkpoint):
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": -1, "tensor": 1}), jax.devices()[:1])
    assert sharding.row_shards(mesh) == sharding.local_row_shards(mesh) == 1
    placed = sharding.put(mesh, {"a": np.arange(6).reshape(3, 2)})
    assert np.array_equal(sharding.fetch_rows(placed["a"]), np.arange(6).reshape(3, 2))
