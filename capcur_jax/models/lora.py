"""Low-rank adaptation (LoRA, arXiv 2106.09685) of the decoder's linear layers: x W + (x A) B x alpha / rank.

A [D_in, rank] and B [rank, D_out] lie beside the layer's kernel as `<layer>.lora_a` and `<layer>.lora_b`. They are in
no checkpoint: `huggingface.load` makes them, `huggingface.save` writes W + A B x alpha / rank.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from capcur_jax.errors import InputError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# Uniform in +-1 / sqrt(D_in), as PEFT and the authors' code start A: kaiming uniform with a = sqrt(5). B starts at 0.
START_A = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
START_A_STACKED = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """What is adapted, and how; rank 0: nothing is.

    Raises:
        InputError: the rank is negative, or a target is none of the decoder's linear layers.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        if self.rank < 0:
            raise InputError(f"config.model.lora.rank = {self.rank}; choose 1 or more, or 0 for no LoRA")
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise InputError(f"config.model.lora.targets = {self.targets!r}; choose some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoRALinear(nnx.Linear):
    """A linear layer with a low-rank addend; W + A B is never made."""

    def __init__(self, in_features: int, out_features: int, *, lora: LoRA, param_dtype, rngs: nnx.Rngs, **kinds: Any):
        super().__init__(in_features, out_features, param_dtype=param_dtype, rngs=rngs, **kinds)
        self.scale = lora.scale
        self.lora_a = nnx.Param(START_A(rngs.params(), (in_features, lora.rank), param_dtype))
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, out_features), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        x, a, b = promote_dtype((x, self.lora_a[...], self.lora_b[...]), dtype=self.dtype)
        return y + ((x @ a) @ b) * self.scale


def linear(lora: LoRA | None, name: str, in_features: int, out_features: int, **kinds: Any) -> nnx.Linear:
    """The decoder's linear layer `name`, adapted where `lora` says so."""
    if lora is None or not lora.rank or name not in lora.targets:
        return nnx.Linear(in_features, out_features, **kinds)
    return LoRALinear(in_features, out_features, lora=lora, **kinds)


def is_factor(path: str) -> bool:
    """Whether a dotted parameter path is that of an A or a B."""
    return path.endswith((".lora_a", ".lora_b"))


def pattern() -> str:
    """The regular expression of parameter paths to freeze so that A and B alone are trained."""
    return r"^(?!.*\.lora_[ab]$)"


def start(path: str, shape: tuple[int, ...], dtype, seed: int, sharding: jax.sharding.Sharding) -> jax.Array:
    """The stacked A [L, D_in, rank] or B [L, rank, D_out] that training starts from, on its devices.

    It depends on seed, path and shape alone, not on the sharding.
    """
    if path.endswith(".lora_b"):
        return jnp.zeros(shape, dtype, device=sharding)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    return _start_a(sharding)(key, shape, jnp.dtype(dtype))


@functools.cache
def _start_a(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    """START_A, which makes each device's shard there; compiled once for each shape."""
    return jax.jit(START_A_STACKED, static_argnums=(1, 2), out_shardings=sharding)


def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + A B x scale in float32, of one layer [D_in, D_out] or of all [L, D_in, D_out]."""
    kernel, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    return kernel + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * scale
