"""What the devices do between two visits of the host: read prompts, or decode a burst of tokens of many responses.

The host says which response is in which row and which pages are its own (places.py); the devices keep nothing but the
pages. A response's tokens depend on the seed, its own number and their place in it alone, not on its row, its pages or
the other responses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from capcur_jax.devices import sharding
from capcur_jax.models import paged
from capcur_jax.models.decoding import DecodingModel, Weights
from capcur_jax.models.logprobs import ban
from capcur_jax.models.paged import Pages, Tables
from capcur_jax.models.qwen_vl import PackedBatch, QwenVL
from capcur_jax.models.text import KeysValues
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local.sampling import sample_tokens

BURST = 128  # tokens of a row between two visits, at most: the host makes sure of their pages before


class Rows(NamedTuple):
    """C rows that decode together, split over the mesh's device rows. int32, if nothing else is said."""

    tokens: jax.Array  # [C] the last one of each response, which is in no page yet
    positions: jax.Array  # [C] of it, for the rotary embedding
    at: jax.Array  # [C] its place in the row's pages: prompt and response before it
    drawn: jax.Array  # [C] tokens of the response, that one included
    left: jax.Array  # [C] tokens that it may still have; 0: nobody is here
    numbers: jax.Array  # [C] uint32: of the response, seeds its tokens
    pages: jax.Array  # [C, pages of a row] those of its device row


class Copies(NamedTuple):
    """Which of a prefill's tokens go to which pages. Of each device row D pages, int32."""

    start: jax.Array  # [device rows x D] where a page's content begins among the tokens of the device row's prompts
    page: jax.Array  # [device rows x D] the page; past the last: none


class Burst(NamedTuple):
    """What a burst drew."""

    tokens: jax.Array  # [C, longest] int32
    logprobs: jax.Array  # [C, longest] float32
    made: jax.Array  # [C] how many


def empty_rows(count: int, table: int) -> Rows:
    """Rows with nobody in them (numpy)."""
    zeros = [np.zeros(count, np.int32) for _ in range(5)]
    return Rows(*zeros, np.zeros(count, np.uint32), np.zeros((count, table), np.int32))


def options(platform: str) -> dict[str, str]:
    """Compiler options of a program that decodes, by the platform's name in jax."""
    # XLA for GPUs makes one product of those with the kernels of queries, keys and values: for every token it copies
    # the three kernels into one.
    return {"xla_gpu_dot_merger_threshold_mb": "0"} if platform == "gpu" else {}


def keys_of(key: jax.Array, numbers: jax.Array, drawn: jax.Array) -> jax.Array:
    """What each response draws its next token with."""
    return jax.vmap(lambda number, at: jax.random.fold_in(jax.random.fold_in(key, number), at))(numbers, drawn)


def admit(
    model: QwenVL,
    pages: Pages,
    batch: PackedBatch,
    copies: Copies,
    numbers_Bxn: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    banned: tuple[int, ...],
) -> tuple[Pages, jax.Array, jax.Array]:
    """Computes prompts once, puts their keys and values into pages, and draws the first token of n responses of each.

    B are the prompts that all packed rows have room for. Returns the pages, tokens [B, n] and their log-probs [B, n].
    """
    h, prompt = model.prefill(batch)
    last = model.last(h, batch)
    logits = ban(model.logits(last.reshape(-1, last.shape[-1])), banned)
    numbers, n = numbers_Bxn.reshape(-1), numbers_Bxn.shape[1]
    keys = keys_of(key, numbers, jnp.zeros(len(numbers), jnp.int32))
    tokens, logprobs = sample_tokens(jnp.repeat(logits, n, axis=0), keys, sampling)

    def put(pages: Pages, prompt: KeysValues, copies: Copies) -> Pages:
        flat = [x.reshape(len(x), -1, *x.shape[3:]) for x in prompt]  # [L, tokens, K, H]
        return tuple(paged.fill(layer, k, v, *copies) for layer, k, v in zip(pages, *flat, strict=True))

    rows, cache = P(sharding.ROWS), P(None, sharding.ROWS, None, "tensor")
    placed = sharding.local(model.mesh, put, (paged.SPEC, cache, rows), paged.SPEC)(pages, prompt, copies)
    return placed, tokens.reshape(-1, n), logprobs.reshape(-1, n)


def decode(
    model: DecodingModel,
    weights: Weights,
    pages: Pages,
    rows: Rows,
    key: jax.Array,
    wanted: jax.Array,
    few: jax.Array,
    steps: jax.Array,
    sampling: Sampling,
    end_tokens: tuple[int, ...],
    banned: tuple[int, ...],
    own: bool,
    longest: int,
) -> tuple[Pages, Burst]:
    """Draws until no device row has more than `few` responses left, one has `wanted` ([device rows]) free rows, or
    `steps` are made, `longest` at most. `own`: see paged.Tables."""
    ends, tables = jnp.array(end_tokens, jnp.int32), Tables(rows.pages, own)
    C = len(rows.tokens)
    none = Burst(jnp.zeros((C, longest), jnp.int32), jnp.zeros((C, longest), jnp.float32), jnp.zeros(C, jnp.int32))

    def running(carry) -> jax.Array:
        done, step = carry[-2:]
        free = done.reshape(len(wanted), -1).sum(1)
        return (
            (free < len(done) // len(wanted) - few).any() & (free < wanted).all() & (step < jnp.minimum(steps, longest))
        )

    def body(carry):
        pages, tokens, burst, done, step = carry
        logits, pages = model.step(weights, pages, tokens, rows.positions + step, rows.at + step, ~done, tables)
        drawn, logprobs = sample_tokens(ban(logits, banned), keys_of(key, rows.numbers, rows.drawn + step), sampling)
        put = jax.lax.dynamic_update_slice_in_dim
        burst = Burst(
            put(burst.tokens, drawn[:, None], step, 1),
            put(burst.logprobs, logprobs[:, None], step, 1),
            burst.made + ~done,
        )
        ended = (drawn[:, None] == ends).any(-1) | (burst.made >= rows.left)
        return pages, drawn, burst, done | ended, step + 1

    start = pages, rows.tokens, none, rows.left <= 0, jnp.zeros((), jnp.int32)
    pages, _, burst, _, _ = jax.lax.while_loop(running, body, start)
    return pages, burst
