"""Decoding with `QwenVL.decode` as the tests need it: response rows of G to a prompt, step by step."""

import jax
import jax.numpy as jnp
import numpy as np


def decode_steps(decode, cache, prompt, tokens_RxT, lengths_B, next_position_B):
    """Hidden states [R, T, D] of response rows; `decode` is the model's, jitted, `cache` empty of S + T slots."""
    S, (R, T) = prompt.keys.shape[2], tokens_RxT.shape
    group = R // len(lengths_B)
    cache = jax.tree.map(lambda own, keys: own.at[:, :, :S].set(jnp.repeat(keys, group, axis=1)), cache, prompt)
    lengths, starts = np.repeat(np.asarray(lengths_B), group), np.repeat(np.asarray(next_position_B), group)
    states = []
    for step in range(T):
        seen = np.concatenate([np.arange(S) < lengths[:, None], np.tile(np.arange(T) <= step, (R, 1))], axis=1)
        h, cache = decode(tokens_RxT[:, step], jnp.asarray(starts + step), jnp.int32(S + step), seen, cache)
        states.append(h)
    return jnp.stack(states, axis=1)
