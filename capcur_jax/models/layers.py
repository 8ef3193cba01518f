"""What both towers share: building a stack of layers and scanning it as one compiled body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from capcur_jax.errors import InputError

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def stack(create: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers in one module whose parameters have a leading layer axis."""
    return nnx.vmap(create, in_axes=0, out_axes=0)(rngs.fork(split=depth))


def scan(layers: nnx.Module, body: Callable, carry: Any, xs: Any = None, remat: str = "none") -> tuple[Any, Any]:
    """`body(layer, carry, x) -> (carry, y)` over the stacked layers, compiled once; `remat` names a policy of REMAT."""
    if remat not in REMAT:
        raise InputError(f"config.model.remat = {remat!r}; choose one of {', '.join(REMAT)}")
    graph, parameters = nnx.split(layers)

    def step(carry, inputs):
        one, x = inputs
        return body(nnx.merge(graph, one), carry, x)

    if REMAT[remat] is not None:
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (parameters, xs))
