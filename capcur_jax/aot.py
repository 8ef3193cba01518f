"""Devices to compile for without having them: what a program needs, by the compiler's own account.

    devices = aot.devices("v5p:2x2x2")  # before jax uses a device of its own
    compiled = jax.jit(f).lower(abstract arrays whose shardings name those devices).compile()
    compiled.memory_analysis()

A TPU target is a topology as Google writes it: v5p:2x2x2, v5e:2x4, v6e:4x4, tpu7x:2x2x1... A GPU target is a card
and how many there are: h100:1, h200:8 (one host), h100:4x8 (four hosts). TPU targets need
`pip install 'libtpu==0.0.42.*'`, GPU targets `pip install jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2` (jax's own
version), and cuDNN attention on top `pip install --no-deps nvidia-cudnn-cu12`.

Known limits: a TPU program that doesn't fit is an error of the compiler; a GPU program is not, so compare its memory
with the card's. Nothing is autotuned for a GPU that isn't there: its kernels may differ from those of a real run.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from capcur_jax.errors import InputError


class _Card(NamedTuple):
    name: str
    memory_bytes: int
    bandwidth: int  # bytes a second


_CARDS = {
    "h100": _Card("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": _Card("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4_800_000_000_000),
}
# XLA's GpuTargetConfigProto of a Hopper card: what jax reads from the driver where there is one.
_HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {card.bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {card.memory_bytes}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{card.name}\""""
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask Google's metadata server which machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-16",  # any will do: the topology's name decides
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the check calls the driver, which isn't there
}


def devices(target: str) -> list[jax.Device]:
    """The target's devices: good for meshes, shardings and compiling, not for running.

    Call it before jax has used a device; this process then computes on its CPU alone.

    Raises:
        InputError: an unknown target, or its compiler isn't installed.
    """
    kind, _, size = target.partition(":")
    tpu = re.fullmatch(r"v\d+[a-z]*|tpu\d+x?", kind) and re.fullmatch(r"\d+(x\d+){1,2}", size)
    gpu = kind in _CARDS and re.fullmatch(r"(\d+x)?\d+", size)
    if not (tpu or gpu):
        cards = ", ".join(f"{card}:8" for card in _CARDS)
        raise InputError(f"target {target!r}: give a TPU topology (v5p:2x2x2, v5e:2x4, v6e:4x4) or GPUs ({cards})")
    module, install = (
        ("libtpu", "'libtpu==0.0.42.*'")
        if tpu
        else ("jax_cuda12_plugin", f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}")
    )
    if importlib.util.find_spec(module) is None:
        raise InputError(f"target {target!r} needs its compiler: pip install {install}")
    os.environ.update(_ENVIRONMENT)
    # Trying out kernels needs a card.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    jax.config.update("jax_platforms", "cpu")
    if tpu:
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    text = _HOPPER.format(card=_CARDS[kind])
    layout = f"1x{size}" if "x" in size else f"1x1x{size}"  # slices x hosts x cards of a host
    return topologies.get_topology_desc("", "cuda", target_config=text, topology=layout).devices
