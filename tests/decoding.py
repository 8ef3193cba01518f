"""Decoding as the tests need it: response rows of G to a prompt, step by step, each in a page of its own."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capcur_jax.models.decoding import DecodingModel
from capcur_jax.models.paged import Tables
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.models.text import KeysValues


def decoder(model: QwenVL) -> Callable[..., np.ndarray]:
    """A function of the prompts' keys and values, tokens [R, T], lengths [B] and next positions [B]: the logits
    [R, T, V] behind each response token."""
    decoding = DecodingModel(model, gathered=False)
    weights = decoding.weights(nnx.state(model))

    @jax.jit
    def step(pages, tokens_R, positions_R, at_R):
        R = len(tokens_R)
        tables = Tables(jnp.arange(R)[:, None], own=True)
        return decoding.step(weights, pages, tokens_R, positions_R, at_R, jnp.ones(R, bool), tables)

    def decode(prompt: KeysValues, tokens_RxT, lengths_B, next_position_B) -> np.ndarray:
        S, (R, T) = prompt.keys.shape[2], tokens_RxT.shape
        group = R // len(lengths_B)

        def filled(pages_KxRxSxH, prompt_BxSxKxH):
            return pages_KxRxSxH.at[:, :, :S].set(jnp.moveaxis(jnp.repeat(prompt_BxSxKxH, group, axis=0), 2, 0))

        empty = decoding.empty_pages(R, S + T)
        pages = tuple(tuple(map(filled, own, of)) for own, of in zip(empty, zip(*prompt, strict=True), strict=True))
        lengths, starts = (np.repeat(np.asarray(x), group) for x in (lengths_B, next_position_B))
        logits = []
        for i in range(T):  # behind the prompt's last token, where its padding was
            one, pages = step(pages, tokens_RxT[:, i], starts + i, lengths + i)
            logits.append(one)
        return np.asarray(jnp.stack(logits, axis=1))

    return decode
