"""Attention of packed rows in plain XLA: group after group, cut out of its row into short padded ones for itself alone.

Most responses are far shorter than the longest allowed, and attention is quadratic. So it is compiled for a few
lengths, and each group takes the shortest that holds its responses, or its prompt where there are prompts alone; an
absent group costs nothing. Axes: axes.py; W are the tokens of a packed row, S and T bound those of a prompt and of a
response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from capcur_jax.models.packed import Packed, Places

_LENGTHS = 3  # that attention is compiled for
Pieces = tuple[jax.Array, jax.Array]  # of a group: its prompt [1, S, N, H] and its responses [G, T, N, H]


def attend(
    q_AxWxNxH: jax.Array,
    k_AxWxKxH: jax.Array,
    v_AxWxKxH: jax.Array,
    layout: Packed,
    causal: Callable,
    extend: Callable,
) -> jax.Array:
    """Each token sees its group's prompt and its own response up to itself: [A, W, N, H]; 0 or anything at padding.

    Args:
        causal: (q, k, v) of short rows -> attention up to each query itself.
        extend: (q, k, v, keys and values of the prompt, its length) -> the same, behind all of the prompt.
    """

    places, bounds = layout.places, (layout.prompt, layout.response)

    def group(q: Pieces, k: Pieces, v: Pieces, here: Places) -> Pieces:
        alone = causal(q[0], k[0], v[0])
        return alone, extend(q[1], k[1], v[1], k[0], v[0], here.prompt_length) if len(q[1]) else q[1]

    def forward(pieces: Sequence[Pieces], here: Places) -> list[Pieces]:
        return [group(*pieces, here)]

    def backward(pieces: Sequence[Pieces], here: Places) -> Sequence[Pieces]:
        *arrays, gradient = pieces
        return jax.vjp(lambda *arrays: group(*arrays, here), *arrays)[1](_masked(gradient, here))

    # Its own gradient: a loop's would keep what all lengths of all groups need.
    @jax.custom_vjp
    def row(q_WxNxH, k_WxKxH, v_WxKxH, places):
        return _each(forward, (q_WxNxH, k_WxKxH, v_WxKxH), places, bounds, 1)[0]

    def gradients(arrays, gradient):
        return *_each(backward, (*arrays[:3], gradient), arrays[3], bounds, 3), None

    row.defvjp(lambda *arrays: (row(*arrays), arrays), gradients)
    # Not vmap, which would compute every length for every group.
    return jax.lax.map(lambda arrays: row(*arrays), (q_AxWxNxH, k_AxWxKxH, v_AxWxKxH, places))


def _each(
    compute: Callable, arrays: Sequence[jax.Array], places: Places, bounds: tuple[int, int], results: int
) -> list[jax.Array]:
    """What `compute(pieces of each array, places of the group)` gives for every group of a row, put together: as many
    rows [W, N, H], like the first arrays."""
    W = len(arrays[0])
    S, T = (min(bound, W) for bound in bounds)  # a short row has the bounds of the longest
    G = len(places.response_start) // len(places.prompt_start)
    longest = T if G else S  # of what differs
    lengths = sorted({min(longest, -(-longest * n // (_LENGTHS * 8)) * 8) for n in range(1, _LENGTHS)} | {longest})
    # No piece passes an array's end, and what is absent has a place behind the row.
    longer = [jnp.pad(x, ((0, max(S, T)), (0, 0), (0, 0))) for x in arrays]

    def step(b, rows):
        cut = jax.lax.dynamic_slice_in_dim
        prompt, responses = (cut(x, b, 1) for x in places[:2]), (cut(x, b * G, G) for x in places[2:])
        here = Places(*prompt, *responses)
        here = here._replace(response_start=jnp.where(here.response_length > 0, here.response_start, W))

        def at(length):
            of_prompt, of_own = (S, length) if G else (length, 0)

            def cut_out(x) -> Pieces:
                own = [cut(x, start, of_own) for start in here.response_start]
                empty = jnp.zeros((0, of_own, *x.shape[1:]), x.dtype)
                return cut(x, here.prompt_start[0], of_prompt)[None], jnp.stack(own) if G else empty

            def run() -> list[Pieces]:
                both = compute([cut_out(x) for x in longer], here)
                return [(_longer(prompt, S), _longer(own, T)) for prompt, own in both]

            return run

        def nothing() -> list[Pieces]:
            return [(jnp.zeros((1, S, *x.shape[1:]), x.dtype), jnp.zeros((G, T, *x.shape[1:]), x.dtype)) for x in rows]

        needed = (here.response_length if G else here.prompt_length).max()
        number = 1 + sum((needed > length).astype(jnp.int32) for length in lengths[:-1])
        number = jnp.where(here.prompt_length[0] > 0, number, 0)
        pieces = jax.lax.switch(number, [nothing, *map(at, lengths)])
        start = jnp.where(number > 0, here.prompt_start[0], W)
        # What a piece writes behind its end is written over by the next one, or lies in padding.
        put = jax.lax.dynamic_update_slice_in_dim
        for i, (prompt, own) in enumerate(pieces):
            rows[i] = put(rows[i], prompt[0], start, 0)
            for r in range(G):
                rows[i] = put(rows[i], own[r], here.response_start[r], 0)
        return rows

    rows = jax.lax.fori_loop(0, len(places.prompt_start), step, [jnp.zeros_like(x) for x in longer[:results]])
    return [x[:W] for x in rows]


def _longer(x_RxTxNxH: jax.Array, tokens: int) -> jax.Array:
    return jnp.pad(x_RxTxNxH, ((0, 0), (0, tokens - x_RxTxNxH.shape[1]), (0, 0), (0, 0)))


def _masked(pieces: Pieces, here: Places) -> Pieces:
    """With 0 behind the ends of prompt and responses, where tokens of others lie."""
    prompt, own = pieces
    inside = jnp.arange(prompt.shape[1]) < here.prompt_length[:, None]
    of_own = jnp.arange(own.shape[1]) < here.response_length[:, None]
    return jnp.where(inside[..., None, None], prompt, 0), jnp.where(of_own[..., None, None], own, 0)
