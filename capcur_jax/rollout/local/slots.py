"""Continuous batching on the devices: C slots decode together, each at its own place in its own response.

A slot's cache is its prompt's keys and values, then a ring of as many tokens as a response may have. All slots write to
the same place of their rings at the same time (one clock for all): a step writes one slice, and what a slot sees of its
ring are the last `lengths` places. A slot whose response has ended is free, and is given another one while the others
go on. A response's tokens depend on the seed and its own number alone, not on its slot or on the other responses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from capcur_jax.axes import Array, Float, Int, Key, checked
from capcur_jax.devices import sharding
from capcur_jax.models.logprobs import ban
from capcur_jax.models.qwen_vl import PromptBatch, QwenVL
from capcur_jax.models.text import KeysValues
from capcur_jax.rollout.engine import Sampling

_BLOCK = 64  # of the vocabulary, see `draw`


class Slots(NamedTuple):
    """C rows, split over the mesh's device rows. A row's S places are those of the longest prompt, then T."""

    cache: KeysValues  # [L, C, S, K, H]
    logits: jax.Array  # [C, V] for the next token
    tokens: jax.Array  # [C, T]
    logprobs: jax.Array  # [C, T]
    lengths: jax.Array  # [C] of the responses so far
    done: jax.Array  # [C] nothing runs here
    numbers: jax.Array  # [C] uint32: of the response, seeds its tokens
    prompts: jax.Array  # [C] tokens of the prompt
    positions: jax.Array  # [C] of the first response token
    clock: jax.Array  # [] steps made, the same for all rows


def specs() -> Slots:
    """How each field lies on a mesh."""
    cache = P(None, sharding.ROWS, None, "tensor")
    return Slots(KeysValues(cache, cache), *[P(sharding.ROWS)] * 8, P())


def empty(model: QwenVL, rows: int, prompt: int, sampling: Sampling) -> Slots:
    """All free."""
    T, zeros = sampling.max_new_tokens, jnp.zeros(rows, jnp.int32)
    return Slots(
        cache=model.empty_cache(rows, prompt + T),
        logits=jnp.zeros((rows, model.config.text.vocabulary), jnp.float32),
        tokens=jnp.zeros((rows, T), jnp.int32),
        logprobs=jnp.zeros((rows, T), jnp.float32),
        lengths=zeros,
        done=jnp.ones(rows, bool),
        numbers=jnp.zeros(rows, jnp.uint32),
        prompts=jnp.ones(rows, jnp.int32),
        positions=zeros,
        clock=jnp.zeros((), jnp.int32),
    )


def admit(
    model: QwenVL,
    slots: Slots,
    batch: PromptBatch,
    rows_Bxn: jax.Array,
    numbers_Bxn: jax.Array,
    banned: tuple[int, ...],
) -> Slots:
    """Computes B prompts once and starts n responses of each, in the slots `rows` (counted within a device row).

    A row number past the last stands for nobody.
    """
    h, prompt = model.prefill(batch)
    logits_BxV = ban(model.logits(model.last(h, batch)), banned)

    def place(slots: Slots, prompt, logits_BxV, lengths_B, next_B, rows_Bxn, numbers_Bxn) -> Slots:
        rows, n = rows_Bxn.reshape(-1), rows_Bxn.shape[1]

        def put(whole, part_B):
            return whole.at[rows].set(jnp.repeat(part_B, n, axis=0).astype(whole.dtype), mode="drop")

        def cached(whole, part):
            T = part.shape[2]
            return whole.at[:, rows, :T].set(jnp.repeat(part, n, axis=1).astype(whole.dtype), mode="drop")

        return slots._replace(
            cache=jax.tree.map(cached, slots.cache, prompt),
            logits=put(slots.logits, logits_BxV),
            lengths=slots.lengths.at[rows].set(0, mode="drop"),
            done=slots.done.at[rows].set(False, mode="drop"),
            numbers=slots.numbers.at[rows].set(numbers_Bxn.reshape(-1), mode="drop"),
            prompts=put(slots.prompts, lengths_B),
            positions=put(slots.positions, next_B),
        )

    by_rows, cache = P(sharding.ROWS), specs().cache
    placed = sharding.local(model.mesh, place, (specs(), cache, *[by_rows] * 5), specs())
    return placed(slots, prompt, logits_BxV, batch.lengths, batch.next_position, rows_Bxn, numbers_Bxn)


def decode(
    model: QwenVL,
    slots: Slots,
    key: jax.Array,
    wanted: jax.Array,
    until: jax.Array,
    sampling: Sampling,
    end_tokens: tuple[int, ...],
    banned: tuple[int, ...],
) -> Slots:
    """Steps until all slots are free, a device row has `wanted` ([device rows]) free ones, or the clock is `until`."""
    ends, T = jnp.array(end_tokens, jnp.int32), sampling.max_new_tokens
    ring = slots.cache.keys.shape[2] - T  # where it begins

    def running(slots: Slots) -> jax.Array:
        free = slots.done.reshape(len(wanted), -1).sum(1)
        return ~slots.done.all() & (free < wanted).all() & (slots.clock < until)

    def body(slots: Slots) -> Slots:
        keys = jax.vmap(lambda number, at: jax.random.fold_in(jax.random.fold_in(key, number), at))
        tokens, logprobs = sample_tokens(slots.logits, keys(slots.numbers, slots.lengths), sampling)
        here = (jnp.arange(T) == slots.lengths[:, None]) & ~slots.done[:, None]
        age_T = (slots.clock - jnp.arange(T)) % T
        seen = [jnp.arange(ring) < slots.prompts[:, None], age_T <= slots.lengths[:, None]]
        place, positions = ring + slots.clock % T, slots.positions + slots.lengths
        h, cache = model.decode(tokens, positions, place, jnp.concatenate(seen, axis=1), slots.cache)
        lengths = slots.lengths + ~slots.done
        return slots._replace(
            cache=cache,
            logits=ban(model.logits(h), banned),
            tokens=jnp.where(here, tokens[:, None], slots.tokens),
            logprobs=jnp.where(here, logprobs[:, None], slots.logprobs),
            lengths=lengths,
            done=slots.done | (tokens[:, None] == ends).any(-1) | (lengths == T),
            clock=slots.clock + 1,
        )

    return jax.lax.while_loop(running, body, slots)


# ---------------------------------------------------------------------- sampling


def allowed(logits_CxV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits with everything outside the `top_k` likeliest, then outside the smallest set of mass `top_p` of these, at
    -inf. The likeliest token always stays, and so do ties with the last one that does."""
    if sampling.top_p == 1 and not 0 < sampling.top_k < logits_CxV.shape[-1]:
        return logits_CxV
    order = jnp.sort(logits_CxV, axis=-1, descending=True)
    if sampling.top_k:
        order = jnp.where(jnp.arange(order.shape[-1]) < sampling.top_k, order, -jnp.inf)
    shares = jax.nn.softmax(order, axis=-1)
    kept = jnp.sum((jnp.cumsum(shares, axis=-1) - shares < sampling.top_p) & (shares > 0), axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(order, kept - 1, axis=-1)
    return jnp.where(logits_CxV >= threshold, logits_CxV, -jnp.inf)


def draw(logits_CxV: jax.Array, uniform_C: jax.Array) -> jax.Array:
    """Tokens [C] with the probabilities of the logits: where the cumulated mass passes `uniform` in [0, 1) of it.

    One number for a row where Gumbel's way takes one for each logit, in two steps (a block of the vocabulary, then a
    token of it) because a long prefix sum is slow. A token of probability 0 is never drawn.
    """
    C, V = logits_CxV.shape
    mass = jnp.exp(logits_CxV - logits_CxV.max(-1, keepdims=True))
    mass = jnp.pad(mass, ((0, 0), (0, -V % _BLOCK))).reshape(C, -1, _BLOCK)
    until = jnp.cumsum(mass.sum(-1), axis=-1)
    target = uniform_C[:, None] * until[:, -1:]
    block = jnp.sum(until <= target, axis=-1, keepdims=True)
    before = jnp.where(block > 0, jnp.take_along_axis(until, jnp.maximum(block - 1, 0), axis=-1), 0.0)
    inside = jnp.take_along_axis(mass, block[:, :, None], axis=1)[:, 0]
    at = jnp.sum(before + jnp.cumsum(inside, axis=-1) <= target, axis=-1)
    # The block's tokens summed one by one may stay a rounding below its sum: then it is the last that has any mass.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1)
    return block[:, 0] * _BLOCK + jnp.minimum(at, last)


@checked
def sample_tokens(
    logits_CxV: Float[Array, "C V"], keys_C: Key[Array, " C"], sampling: Sampling
) -> tuple[Int[Array, " C"], Float[Array, " C"]]:
    """Tokens [C] and their log-probs [C] over the full softmax (not renormalised for top-p and top-k, as servers report
    it); each row draws with its own key."""
    scaled = logits_CxV / sampling.temperature if sampling.temperature else logits_CxV
    if sampling.temperature == 0:
        tokens = jnp.argmax(scaled, axis=-1)
    else:
        tokens = draw(allowed(scaled, sampling), jax.vmap(jax.random.uniform)(keys_C))
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, axis=-1)
