"""What the kinds of work of a step reach, a second, on one device.

They are the table of docs/plan.md: public measurements and guesses for H200 and v5p, since no card was at hand. Other
GPUs (TPUs) have those of H200 (v5p) in proportion to their peaks.
"""

from __future__ import annotations

from typing import NamedTuple

from capcur_jax.plan.topologies import GPUS, TPUS, Topology

_T, _GB = 1e12, 1e9
BACKWARD = 2.5  # FLOPs of attention backwards, of those forwards: the scores are computed once more


class Kernel(NamedTuple):
    """An attention kernel: FLOP/s."""

    forward: float
    backward: float
    heads: int  # their dimensions are padded to a multiple of this


class Rates(NamedTuple):
    """Bytes, FLOPs and seconds."""

    linear: float  # products with the decoder's parameters
    attention: Kernel  # of prompts and responses
    images: Kernel  # of patches
    vision: float  # products with the vision tower's parameters
    memory: float  # of the device's memory
    link: float  # sent to other devices
    exposed: float  # share of what a pass sends that no computing hides
    exposed_gradient: float  # and of a gradient, whose sums are scattered
    launch: float  # to start a pass and to end it
    turn: float  # to start the kernels of one token's step
    gather: float  # for each collective of one token's step
    hidden: float  # share of a token's step that runs beside its collectives


_EDGES = 1.15  # a kernel computes blocks at the edges of a mask in whole
_GPU = Rates(
    linear=580 * _T, attention=Kernel(550 * _T / _EDGES, 420 * _T / _EDGES, 1),
    images=Kernel(330 * _T, 330 * _T, 1), vision=450 * _T, memory=4000 * _GB, link=330 * _GB,
    exposed=0.15, exposed_gradient=0.36, launch=0.004, turn=0.0018, gather=12e-6, hidden=0.57,
)  # fmt: skip
_TPU = Rates(
    linear=275 * _T, attention=Kernel(200 * _T / _EDGES, 180 * _T / _EDGES, 1),
    images=Kernel(200 * _T, 143 * _T, 128), vision=230 * _T, memory=2200 * _GB, link=420 * _GB,
    exposed=0.15, exposed_gradient=0.3, launch=0.002, turn=0.001, gather=0.0, hidden=0.0,
)  # fmt: skip


class Host(NamedTuple):
    """What hosts and servers reach: bytes and responses a second, seconds, shares."""

    arrays: float = 6.6 * _GB  # of a batch's arrays, made and sent
    graded: float = 320.0  # responses, by one worker of config.reward.workers
    graders: int = 48  # workers where config.reward.workers is 0: half of a host's cores; a guess
    offload: float = 6.0 * _GB  # of a device's state to the host or back, where servers take turns with the trainer
    served: float = 1.0 * _GB  # of weights from the trainer to the servers' memory
    server_step: float = 0.0038  # a server's own seconds for a token of all its responses
    server_memory: float = 0.75  # share of the memory's peak at which servers read keys and values
    server_waves: float = 1.25  # more steps than the longest response has, where prompts wait for a place
    server_prompts: int = 64  # that a server's device takes at once
    server_prefill: float = 0.75  # of the rate of products, in a server's prefill
    server_start: float = 3.0  # seconds of a step's first and last requests


HOST = Host()


def of(topology: Topology) -> Rates:
    """Of a TPU's or GPU's devices."""
    tpu = topology.platform == "tpu"
    base, known = (_TPU, TPUS["v5p"]) if tpu else (_GPU, GPUS["h200"])
    chip = {**TPUS, **GPUS}[topology.chip]
    flops, memory, link = (getattr(chip, name) / getattr(known, name) for name in ("flops", "bandwidth", "link"))

    def scaled(kernel: Kernel) -> Kernel:
        return kernel._replace(forward=kernel.forward * flops, backward=kernel.backward * flops)

    return base._replace(
        linear=base.linear * flops, vision=base.vision * flops,
        attention=scaled(base.attention), images=scaled(base.images),
        memory=base.memory * memory, link=base.link * link,
    )  # fmt: skip
