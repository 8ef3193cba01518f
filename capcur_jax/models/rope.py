"""Rotary embeddings of both towers. Angles are made in float32: in bfloat16 they are off by 0.1 rad at position 74."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from capcur_jax.models.config import TextConfig, VisionConfig


def mrope_axes(sections: tuple[int, int, int], interleaved: bool) -> np.ndarray:
    """Which of (time, height, width) gives each rotary frequency: [H/2] of 0, 1, 2.

    Qwen2.5-VL has them one after the other. Qwen3-VL interleaves them (t h w t h w ... t t): only the choice is
    interleaved, the rotation stays half-split.
    """
    if not interleaved:
        return np.repeat(np.arange(3, dtype=np.int32), sections)
    axes = np.zeros(sum(sections), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def text_angles(positions_3xAxT: jax.Array, config: TextConfig) -> jax.Array:
    """Angles [A, T, H/2], float32, of the decoder's MRoPE."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
    axes = mrope_axes(config.mrope_sections, config.mrope_interleaved)
    chosen = jnp.moveaxis(positions_3xAxT[axes], 0, -1)
    return chosen.astype(jnp.float32) * frequencies


def vision_angles(coordinates: jax.Array, config: VisionConfig) -> jax.Array:
    """Angles [..., H/2], float32, of the vision tower's 2-D rotary; coordinates [..., 2] are (row, column)."""
    half = config.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
    angles = coordinates.astype(jnp.float32)[..., None] * frequencies
    return angles.reshape(*coordinates.shape[:-1], half)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Half-split rotation of x [..., T, N, H] by angles [..., T, H/2], in float32, returned in x's dtype."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
