"""FLOPs of a traced program, with loops multiplied out, which the compilers' own cost analyses do not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def jaxpr_flops(jaxpr: Any, trips: int = 1, kind: str = "") -> int:
    """FLOPs of the matrix products and convolutions in one run of a traced program (`jax.jit(f).trace(...).jaxpr`), all
    devices together; what is recomputed backwards counts again.

    Where a function has kernels of its own for some platforms (attention), its plain form is counted: every product of
    a query with a key, as is usual, though kernels skip blocks that a mask leaves empty.

    Args:
        trips: how often a loop without a known length runs.
        kind: "linear": products with parameters, which have no batch axes; "attention": those that have; "": both.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_flops(equation, trips, kind) for equation in jaxpr.eqns)


def _flops(equation: Any, trips: int, kind: str) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), (batched, _) = parameters["dimension_numbers"]
        if kind and (kind == "attention") != bool(batched):
            return 0
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        if kind == "attention":
            return 0
        kernel, spec = equation.invars[1].aval.shape, parameters["dimension_numbers"].rhs_spec
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[spec[0]]
    if name == "cond":
        platforms = parameters.get("branches_platforms") or [None] * len(parameters["branches"])
        plain = [b for b, of in zip(parameters["branches"], platforms, strict=True) if not of]
        return max(jaxpr_flops(branch, trips, kind) for branch in plain or parameters["branches"])
    if name == "while":
        return trips * jaxpr_flops(parameters["body_jaxpr"], trips, kind)
    inner = sum(jaxpr_flops(jaxpr, trips, kind) for jaxpr in _jaxprs(parameters.values()))
    if name == "scan":
        return parameters["length"] * inner
    if name == "shard_map":  # shapes inside are those of a device
        return math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"]) * inner
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid) * inner
    return inner


def _jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _jaxprs(value)
        elif hasattr(getattr(value, "jaxpr", value), "eqns"):
            yield value
