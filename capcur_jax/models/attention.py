"""Attention as the layouts of this project need it, behind one function: `attend(q, k, v, layout)`.

Axes: axes.py. The rows A of queries are packed rows or rows of patches, as the layout says; of patches T = S = P.
Decoding has its own (paged.py). Scores and softmax are float32; grouped heads are never repeated in memory.

Which code computes it is decided here alone. `reference`, plain XLA, serves float32, CPUs, short rows and windows
everywhere; everything else is checked against it. 16-bit floats on an accelerator take the kernel of the
platform that the program is lowered for (ways.py says which).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from capcur_jax.axes import Array, Float, checked
from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.models import attention_groups
from capcur_jax.models import ways as ways_lib
from capcur_jax.models.packed import Packed, Places

IMPLEMENTATIONS = ("auto", "xla")
_MASKED = np.float32(np.finfo(np.float32).min)


class Segments(NamedTuple):
    """Patches that see only those of their own segment: an image, or a window of one.

    Of images tables say where each lies in its row, rising; 0 patches: there is none. Kernels read those and skip the
    rest of a row. `reach`: 0, or a bound on the length of a segment whose patches follow one another (windows): XLA's
    attention then costs P x reach, not P x P.
    """

    ids_JxP: jax.Array
    starts_JxI: jax.Array | None = None  # None: of windows
    lengths_JxI: jax.Array | None = None
    reach: int = 0


Layout = Packed | Segments


@checked
def attend(
    q_AxTxNxH: Float[Array, "A T N H"],
    k_AxSxKxH: Float[Array, "A S K H"],
    v_AxSxKxH: Float[Array, "A S K H"],
    layout: Layout,
    mesh: Mesh,
    implementation: str = "auto",
) -> Float[Array, "A T N H"]:
    """Softmax attention [A, T, N, H] of the queries over the keys that the layout lets them see.

    A query with nothing to look at (padding) gets finite values that nobody reads. `implementation`: "auto", or "xla"
    for the reference everywhere. On a mesh each device attends for its own rows and kv heads (the compiler could not
    split a Pallas kernel).
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"config.model.attention = {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    rows_heads, rows = P(sharding.ROWS, None, "tensor"), P(sharding.ROWS)
    arrays, structure = _parts(layout)

    def own(q, k, v, *arrays):
        return _attend_here(q, k, v, structure(*arrays), implementation)

    attended = sharding.local(mesh, own, (rows_heads,) * 3 + (rows,) * len(arrays), rows_heads)
    return attended(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH, *arrays)


def _parts(layout: Layout) -> tuple[tuple[jax.Array, ...], Callable[..., Layout]]:
    """The layout's arrays, and what makes it again from them."""
    if isinstance(layout, Packed):
        return tuple(layout.places), lambda *arrays: layout._replace(places=Places(*arrays))
    if layout.starts_JxI is None:
        return (layout.ids_JxP,), lambda ids: layout._replace(ids_JxP=ids)
    return tuple(layout[:3]), lambda *arrays: Segments(*arrays, reach=layout.reach)


def _attend_here(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH, layout: Layout, implementation: str) -> jax.Array:
    fused = {} if implementation == "xla" else _kernels(q_AxTxNxH, layout)
    plain = functools.partial(reference, layout=layout)
    if not fused:
        return plain(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH)
    return jax.lax.platform_dependent(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH, default=plain, **fused)


def _kernels(q_AxTxNxH: jax.Array, layout: Layout) -> dict[str, Callable]:
    """By platform, what serves this layout better than XLA does.

    Nothing does for float32 (the reference, and cuDNN has none), nor for windows: XLA computes 3 x reach keys a query,
    kernels many more, since their blocks hold several.
    """
    shape, dtype = q_AxTxNxH.shape, q_AxTxNxH.dtype
    if isinstance(layout, Segments) and layout.starts_JxI is None:
        return {}
    found = {platform: ways_lib.of(platform, shape, dtype).kernels for platform in ways_lib.PLATFORMS}
    return {platform: _fused(kernels, layout, shape[1]) for platform, kernels in found.items() if kernels}


def _fused(kernels: ModuleType, layout: Packed | Segments, longest: int) -> Callable:
    if isinstance(layout, Packed):
        return functools.partial(kernels.packed, layout=layout)
    return functools.partial(kernels.segments, starts=layout.starts_JxI, lengths=layout.lengths_JxI, longest=longest)


def reference(q_AxTxNxH: jax.Array, k_AxSxKxH: jax.Array, v_AxSxKxH: jax.Array, layout: Layout) -> jax.Array:
    """`attend` in plain XLA, for any layout, type and platform; it holds the scores of all heads in memory."""
    if isinstance(layout, Segments) and 0 < 3 * layout.reach < q_AxTxNxH.shape[1]:
        return _banded(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH, layout)
    if isinstance(layout, Segments):
        return _attend(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH, layout.ids_JxP[:, :, None] == layout.ids_JxP[:, None, :])
    return attention_groups.attend(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH, layout, _causal, _extend)


def _causal(q_AxTxNxH: jax.Array, k_AxTxKxH: jax.Array, v_AxTxKxH: jax.Array) -> jax.Array:
    T = q_AxTxNxH.shape[1]
    return _attend(q_AxTxNxH, k_AxTxKxH, v_AxTxKxH, np.tril(np.ones((1, T, T), bool)))


def _extend(q_RxTxNxH, k_RxTxKxH, v_RxTxKxH, keys_BxSxKxH, values_BxSxKxH, lengths_B) -> jax.Array:
    """Each query sees its prompt's first `lengths_B` keys and its row's own up to itself; row r is of prompt r // G."""
    T, S = q_RxTxNxH.shape[1], keys_BxSxKxH.shape[1]
    prompt = keys_BxSxKxH, values_BxSxKxH, jnp.arange(S) < lengths_B[:, None]
    return _attend(q_RxTxNxH, k_RxTxKxH, v_RxTxKxH, np.tril(np.ones((1, T, T), bool)), prompt)


def _attend(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH, mask, prompt=None) -> jax.Array:
    """`mask` broadcasts to [A, T, S] and speaks of the own keys; `prompt` is (keys, values, mask [B, S])."""
    A, T, N, H = q_AxTxNxH.shape
    K = k_AxSxKxH.shape[2]
    q = (q_AxTxNxH * np.asarray(H**-0.5, q_AxTxNxH.dtype)).reshape(A, T, K, N // K, H)
    scores = jnp.einsum("atkmh,askh->akmts", q, k_AxSxKxH, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.asarray(mask)[:, None, None], scores, _MASKED)
    if prompt is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v_AxSxKxH.dtype)
        return jnp.einsum("akmts,askh->atkmh", weights, v_AxSxKxH).reshape(A, T, N, H)

    keys_BxSxKxH, values_BxSxKxH, mask_BxS = prompt
    B, S0 = mask_BxS.shape
    grouped = q.reshape(B, A // B, T, K, N // K, H)
    shared = jnp.einsum("bgtkmh,bskh->bgkmts", grouped, keys_BxSxKxH, preferred_element_type=jnp.float32)
    shared = jnp.where(mask_BxS[:, None, None, None, None], shared, _MASKED)
    scores = jnp.concatenate([shared.reshape(A, K, N // K, T, S0), scores], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_AxSxKxH.dtype)
    of_prompt = weights[..., :S0].reshape(B, A // B, K, N // K, T, S0)
    out = jnp.einsum("akmts,askh->atkmh", weights[..., S0:], v_AxSxKxH)
    out += jnp.einsum("bgkmts,bskh->bgtkmh", of_prompt, values_BxSxKxH).reshape(out.shape)
    return out.reshape(A, T, N, H)


def _banded(q_AxTxNxH, k_AxSxKxH, v_AxSxKxH, layout: Segments) -> jax.Array:
    """Segments of at most `reach` neighbours: blocks of `reach` queries against their own block and its neighbours."""
    J, P, N, H = q_AxTxNxH.shape
    W = layout.reach
    blocks = -(-P // W)

    def cut(x, around):
        """[J x blocks, W (x 3), ...]: each block, with the ones before and after it if `around`."""
        x = jnp.pad(x, ((0, 0), (W * around, blocks * W - P + W * around)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(J, -1, W, *x.shape[2:])
        if around:
            x = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)
        return x.reshape(J * blocks, *x.shape[2:])

    # Raised by one: what is padded on has segment 0, which no patch has.
    ids = layout.ids_JxP + 1
    mask = cut(ids, 0)[:, :, None] == cut(ids, 1)[:, None, :]
    out = _attend(cut(q_AxTxNxH, 0), cut(k_AxSxKxH, 1), cut(v_AxSxKxH, 1), mask)
    return out.reshape(J, blocks * W, N, H)[:, :P]
