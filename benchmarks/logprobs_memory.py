"""Memory of token log-probs and their gradients at the 8B model's size: blockwise against all logits at once.

    python benchmarks/logprobs_memory.py --target=tpu:v5p:2x2x1 --target=cuda:h100:1x1x1 [--block=4096] [--tensor=2]

Nothing runs: both are compiled for devices that aren't there (capcur_jax/plan/topologies.py lists targets and what each
needs installed), and the compiler says how much temporary memory a device needs besides arguments and results. Both
compute log-probs [T] and the gradients of their weighted sum to h [T, D] and to the kernel [D, V]; the blockwise side
computes the entropy and differentiates through it as well. Factors are bfloat16, logits and log-probs float32. Seconds
a program for a GPU, minutes for a TPU. docs/figures.md has the figures.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import record
from absl import app, flags
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from capcur_jax.errors import InputError
from capcur_jax.models.logprobs import BLOCK, Shards, token_logprobs
from capcur_jax.plan import topologies

_TARGET = flags.DEFINE_multi_string(
    "target", ["tpu:v5p:2x2x1", "cuda:h100:1x1x1"], "What to compile for; may be repeated."
)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "T")
_WIDTH = flags.DEFINE_integer("width", 4096, "D")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 151_936, "V")
_BLOCK = flags.DEFINE_integer("block", BLOCK, "Tokens of the vocabulary in a block.")
_TENSOR = flags.DEFINE_integer(
    "tensor", 0, "Devices that split the vocabulary; the others split tokens and width. 0: all on one device."
)


def plain(h, kernel, tokens, weights):
    """What jax differentiates if it is told the definition."""
    logits = jnp.einsum("td,dv->tv", h, kernel, preferred_element_type=jnp.float32)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]
    return (weights * logprobs).sum(), logprobs


def blockwise(shards: Shards | None):
    def loss(h, kernel, tokens, weights):
        new = token_logprobs(h, kernel, tokens, block=_BLOCK.value, shards=shards)
        return (weights * (new.logprobs + 0.01 * new.entropy)).sum(), new.logprobs

    return loss


def compiled(loss, mesh: Mesh, tokens: P, kernel: P):
    """The program for one device of the mesh."""
    T, D, V = _TOKENS.value, _WIDTH.value, _VOCABULARY.value
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((T, D), jnp.bfloat16, tokens),
            ((D, V), jnp.bfloat16, kernel),
            ((T,), jnp.int32, tokens),
            ((T,), jnp.float32, tokens),
        )
    ]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return step.lower(*arguments).compile()


def measure(target: str) -> dict[str, float]:
    """Temporary GiB of both sides, which it prints."""
    devices = topologies.devices(target)
    tensor = _TENSOR.value
    count = len(devices) if tensor else 1
    if count % max(tensor, 1):
        raise InputError(f"--tensor={tensor} does not divide the {count} devices of {target}")
    mesh = jax.make_mesh(
        (count // max(tensor, 1), max(tensor, 1)), ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=devices[:count]
    )
    tokens, kernel = P("fsdp"), P("fsdp", "tensor")
    sizes = {}
    for name, loss in (
        ("blockwise", blockwise(Shards(mesh, tokens, kernel) if tensor else None)),
        ("all at once", plain),
    ):
        start = time.perf_counter()
        sizes[name] = compiled(loss, mesh, tokens, kernel).memory_analysis().temp_size_in_bytes
        ratio = f"{sizes[name] / sizes['blockwise']:.1f}x" if name != "blockwise" else ""
        seconds = time.perf_counter() - start
        print(f"{target:16} {count:7} {name:12} {sizes[name] / 2**30:9.3f} {ratio:>9} {seconds:8.0f}", flush=True)
    return {"blockwise": sizes["blockwise"] / 2**30, "plain": sizes["all at once"] / 2**30}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    print(f"T = {_TOKENS.value:,}, D = {_WIDTH.value:,}, V = {_VOCABULARY.value:,}, block {_BLOCK.value:,}, bfloat16")
    print(f"{'target':16} {'devices':>7} {'log-probs':12} {'temp, GiB':>9} {'blockwise':>9} {'compile s':>9}")
    try:
        found = [{"target": target} | measure(target) for target in _TARGET.value]
    except InputError as error:
        sys.exit(str(error))
    record.write({"targets": found}, ("capcur_jax/models/logprobs.py",))


if __name__ == "__main__":
    app.run(main)
