"""Which way the attention of packed rows and of images takes on a platform, and why: for `attend`, and for plans."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp

from capcur_jax.models import packed_gpu, packed_tpu

SHORTEST = 128  # tokens of rows that a kernel takes at once; scores of shorter rows are small and XLA's
PLATFORMS = ("cuda", "tpu")
GATHERED = "group after group"  # XLA's way with packed rows
_NAMES = {"cuda": "cuDNN's packed segments", "tpu": "splash, its blocks found at run time"}


class Way(NamedTuple):
    """How attention is computed."""

    kernels: ModuleType | None  # with `packed` and `segments`; None: XLA, group after group
    name: str
    reason: str  # why no kernel; "" with one

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def of(platform: str, shape: Sequence[int], dtype, implementation: str = "auto") -> Way:
    """Of queries [A, T, N, H] on one device of the platform ("cpu", "cuda" or "tpu").

    `implementation`: config.model.attention, "auto" or "xla".
    """
    rows, tokens, heads, head = shape
    dtype = jnp.dtype(dtype)
    refusals = {"cuda": lambda: packed_gpu.refusal(rows * tokens, heads, head), "tpu": packed_tpu.refusal}
    if implementation == "xla":
        reason = "config.model.attention is xla"
    elif platform not in refusals:
        reason = f"no kernel for {platform}"
    elif dtype.itemsize != 2:
        reason = f"kernels take 16-bit floats, not {dtype}"
    elif tokens < SHORTEST:
        reason = f"rows of {tokens} tokens are short"
    else:
        reason = refusals[platform]()
    if reason:
        return Way(None, GATHERED, reason)
    return Way(packed_gpu if platform == "cuda" else packed_tpu, _NAMES[platform], "")
