"""Devices to compile for without having them: what a program needs, by the compiler's own account.

    devices = topologies.devices("tpu:v5p:2x2x2")  # before jax uses a device of its own
    compiled = jax.jit(f).lower(abstract arrays whose shardings name those devices).compile()
    compiled.memory_analysis()

A topology is spelled platform:chip:layout.

    tpu:v5p:2x2x2   chips along each side of the slice, as Google writes it (v5p-16); also v5e:4x8, v6e:4x4, tpu7x:2x2x1
    cuda:h200:1x1x8 slices x hosts x cards of a host; h100, h200 or b200
    cpu:8           virtual devices of this machine's CPU: for numerics. Their memory predicts no accelerator's

`pip install '.[plan]'` brings the compilers: libtpu for a TPU; for a GPU jax's CUDA plugin, and cuDNN for its
attention (`pip install --no-deps nvidia-cudnn-cu12` spares the rest of CUDA).

Known limits: a TPU program that doesn't fit is an error of the compiler; a GPU program is not, so compare its memory
with the card's. Nothing is autotuned for a GPU that isn't there: its kernels may differ from those of a real run.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from capcur_jax.errors import InputError


class Chip(NamedTuple):
    """What one jax device has (half a chip of a TPU7x). Rates are the makers' peaks, a second."""

    memory_bytes: int  # that programs can use
    flops: float  # bfloat16, dense
    bandwidth: float  # bytes from and to its memory
    link: float  # bytes it sends to devices of its slice (TPU) or host (GPU)
    network: float  # bytes it sends to others


_GIB, _GB, _T = 2**30, 1e9, 1e12
# Memory is what libtpu 0.0.42's compiler says is available ("exceeds available HBM"), rates are those of
# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}: links are half of "bidirectional ICI bandwidth per chip". v4 is
# left out: its deviceless topology has each core as a device, which is not how it is used.
TPUS = {
    "v5e": Chip(int(15.75 * _GIB), 197 * _T, 819 * _GB, 200 * _GB, 3.1 * _GB),
    "v5p": Chip(int(95.74 * _GIB), 459 * _T, 2765 * _GB, 600 * _GB, 6.2 * _GB),
    "v6e": Chip(int(31.25 * _GIB), 918 * _T, 1638 * _GB, 400 * _GB, 12.5 * _GB),
    "tpu7x": Chip(int(94.75 * _GIB), 1153.5 * _T, 3690 * _GB, 300 * _GB, 6.2 * _GB),
}
# Memory, bandwidth and cores are what XLA's own target descriptions of the SXM cards say (openxla/xla,
# xla/backends/gpu/target_config/specs), peaks and NVLink (one direction) NVIDIA's data sheets, without sparsity; the
# network is one 400 Gbit/s adapter a card (B200: 800).
GPUS = {
    "h100": Chip(84_942_979_072, 989.4 * _T, 3352 * _GB, 450 * _GB, 50 * _GB),
    "h200": Chip(151_397_597_184, 989.4 * _T, 4800 * _GB, 450 * _GB, 50 * _GB),
    "b200": Chip(191_514_411_008, 2250 * _T, 7672 * _GB, 900 * _GB, 100 * _GB),
}


class _Silicon(NamedTuple):
    description: str
    capability: int
    cores: int
    l2_cache: int
    clock: float


_SILICON = {
    "h100": _Silicon("NVIDIA H100 80GB HBM3", 9, 132, 52_428_800, 1.98),
    "h200": _Silicon("NVIDIA H200 141GB HBM3e", 9, 132, 52_428_800, 1.98),
    "b200": _Silicon("NVIDIA B200", 10, 148, 132_644_864, 1.965),
}
# XLA's GpuTargetConfigProto: what jax reads from the driver where there is one.
_CARD = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: {silicon.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {silicon.l2_cache} clock_rate_ghz: {silicon.clock}
  device_memory_size: {chip.memory_bytes}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: {silicon.capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{silicon.description}\""""
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask Google's metadata server which machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-16",  # any will do: the topology's name decides
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the check calls the driver, which isn't there
}
_MODULES = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin",)}
_KERNELS = {"cuda": ("nvidia.cudnn",)}
_PACKAGES = {"libtpu": "libtpu", "jax_cuda12_plugin": "jax-cuda12-plugin", "nvidia.cudnn": "nvidia-cudnn-cu12"}


class Topology(NamedTuple):
    """A topology's name, read."""

    name: str
    platform: str  # cpu, tpu or cuda
    chip: str  # "" for cpu
    layout: tuple[int, ...]

    @property
    def facts(self) -> Chip | None:
        """None for cpu."""
        return {**TPUS, **GPUS}.get(self.chip)


def parse(name: str) -> Topology:
    """Reads cpu:8, tpu:v5p:2x2x2, cuda:h200:1x1x8... Raises InputError that says which there are."""
    platform, _, rest = name.partition(":")
    chip, _, size = rest.rpartition(":")
    layout = tuple(int(side) for side in size.split("x")) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) else ()
    sides = {
        "cpu": (1,) if not chip else (),
        "tpu": {"v5p": (3,), "tpu7x": (3,), "v5e": (2,), "v6e": (2,)}.get(chip, ()),
        "cuda": (3,) if chip in GPUS else (),
    }.get(platform, ())
    if len(layout) not in sides:
        raise InputError(
            f"topology {name!r} is unknown: give cpu:8, tpu:v5e:4x8, tpu:v5p:2x2x2, tpu:v6e:4x4, tpu:tpu7x:2x2x1, or "
            f"slices x hosts x cards of {', '.join(GPUS)} (cuda:h200:1x1x8)"
        )
    return Topology(name, platform, chip, layout)


def missing(platform: str, kernels: bool = True) -> list[str]:
    """The packages that compiling for this platform needs and that aren't installed; `kernels`: for programs with the
    platform's attention, too, which on GPUs is cuDNN's."""

    def there(module: str) -> bool:
        package = module.partition(".")[0]
        return importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None

    modules = _MODULES.get(platform, ()) + (_KERNELS.get(platform, ()) if kernels else ())
    return [_PACKAGES[module] for module in modules if not there(module)]


def devices(name: str, kernels: bool = True) -> list[jax.Device]:
    """The topology's devices: good for meshes, shardings and compiling; those of a CPU for running, too.

    Call it before jax has used a device; this process then computes on its CPU alone. `kernels`: see `missing`.

    Raises:
        InputError: an unknown topology, or its compiler isn't installed.
    """
    topology = parse(name)
    if lacking := missing(topology.platform, kernels):
        raise InputError(f"topology {name!r} needs {' and '.join(lacking)}: pip install 'capcur_jax[plan]'")
    os.environ.update(_ENVIRONMENT)
    # Trying out kernels needs a card; the default of those that are tried out, Triton's, does not exist for all shapes.
    chosen = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {chosen}".strip()
    jax.config.update("jax_platforms", "cpu")
    if topology.platform == "cpu":
        count = math.prod(topology.layout)
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError as error:
            raise InputError(f"topology {name!r}: {error}") from None
        return jax.devices()[:count]
    layout = "x".join(map(str, topology.layout))
    if topology.platform == "tpu":
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.chip}:{layout}").devices
        except Exception as error:  # jaxlib has no class of its own for it
            raise InputError(f"topology {name!r}: libtpu knows no such slice ({str(error).splitlines()[0]})") from None
    chip, silicon = GPUS[topology.chip], _SILICON[topology.chip]
    text = _CARD.format(chip=chip, silicon=silicon, bandwidth=int(chip.bandwidth))
    return topologies.get_topology_desc("", "cuda", target_config=text, topology=layout).devices
