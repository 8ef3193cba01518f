"""The vision towers: patches -> one feature per merged 2 x 2 block.

Qwen3-VL adds learned positions, sees whole images, and gives some blocks' features to the decoder (DeepStack);
Qwen2.5-VL sees windows in most blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from capcur_jax.devices import sharding
from capcur_jax.models import layers as layers_lib
from capcur_jax.models.attention import Segments, attend
from capcur_jax.models.config import VisionConfig
from capcur_jax.models.rope import rotate, vision_angles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionBatch:
    """The images of a batch, packed into J rows of P patches (see inputs.py, which makes every index on the host).

    Patches come in merge-block order: four neighbours that merge into one feature follow one another. Where the tower
    has windows, the blocks of a window follow one another too, so that nothing is permuted on the device.
    """

    patches: Any  # [J, P, channels x pixels] uint8, as the image has them
    table_index: Any  # [J, P, 4] int32 into the learned positions; None where the tower has none
    table_weight: Any  # [J, P, 4] float32, bilinear; None likewise
    coordinates: Any  # [J, P, 2] int32 (row, column) of the patch in its image
    segments: Any  # [J, P] int32: 0 padding, otherwise the number of the image in its row, from 1
    starts: Any  # [J, I] int32: where image i + 1 begins in its row
    lengths: Any  # [J, I] int32: its patches, 0: there is none
    windows: Any  # [J, P] int32: likewise for the windows of all its images; None where the tower has none


def pixel_values(patches, config: VisionConfig) -> jax.Array:
    """Bytes [..., channels x pixels] -> [..., channels x frames x pixels] float32, as transformers' image processor has
    them: (byte x rescale - mean) / std. A still image fills the frames of a patch alike."""
    lead, pixels = patches.shape[:-1], config.patch_size**2
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (config.mean, config.std))
    scaled = jnp.asarray(patches).reshape(*lead, config.channels, 1, pixels).astype(jnp.float32)
    normal = (scaled * np.float32(config.rescale) - mean) / std
    frames = jnp.broadcast_to(normal, (*lead, config.channels, config.temporal_patch_size, pixels))
    return frames.reshape(*lead, config.patch_values)


class VisionAttention(nnx.Module):
    def __init__(self, config: VisionConfig, dtype, param_dtype, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = nnx.Linear(config.width, 3 * config.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.out = nnx.Linear(config.width, config.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x_JxPxD, angles, attend: Callable):
        J, P, D = x_JxPxD.shape
        q, k, v = jnp.moveaxis(self.qkv(x_JxPxD).reshape(J, P, 3, self.heads, D // self.heads), 2, 0)
        return self.out(attend(rotate(q, angles), rotate(k, angles), v).reshape(J, P, D))


def _norm(width: int, rms: bool, **kinds) -> nnx.Module:
    if rms:
        return nnx.RMSNorm(width, epsilon=1e-6, **kinds)
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, **kinds)


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = _norm(config.width, config.rms_norm, **kinds)
        self.norm2 = _norm(config.width, config.rms_norm, **kinds)
        self.attention = VisionAttention(config, **kinds)
        self.up = nnx.Linear(config.width, config.mlp_width, **kinds)
        if config.gated:
            self.gate = nnx.Linear(config.width, config.mlp_width, **kinds)
        self.down = nnx.Linear(config.mlp_width, config.width, **kinds)
        self.activation, self.gated = config.activation, config.gated

    def __call__(self, x, angles, attend: Callable):
        x = x + self.attention(self.norm1(x), angles, attend)
        y, activation = self.norm2(x), layers_lib.ACTIVATION[self.activation]
        return x + self.down(activation(self.gate(y)) * self.up(y) if self.gated else activation(self.up(y)))


class Merger(nnx.Module):
    """Four neighbouring patches -> one decoder-wide feature. DeepStack's mergers normalise after the shuffle."""

    def __init__(self, config: VisionConfig, after_shuffle: bool, dtype, param_dtype, rngs: nnx.Rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.after_shuffle = after_shuffle
        self.wide = config.width * config.merge_size**2
        width = self.wide if after_shuffle else config.width
        self.norm = _norm(width, config.rms_norm, **kinds)
        self.up = nnx.Linear(self.wide, self.wide, **kinds)
        self.down = nnx.Linear(self.wide, config.out_width, **kinds)

    def __call__(self, x_JxPxD):
        J = x_JxPxD.shape[0]
        if self.after_shuffle:
            x = self.norm(x_JxPxD.reshape(J, -1, self.wide))
        else:
            x = self.norm(x_JxPxD).reshape(J, -1, self.wide)
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class VisionTower(nnx.Module):
    def __init__(
        self, config: VisionConfig, dtype, param_dtype, remat: str, attention: str, mesh: Mesh, rngs: nnx.Rngs
    ):
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        self.config, self.remat, self.attention, self.mesh, self.dtype = config, remat, attention, mesh, dtype
        self.patch = nnx.Linear(config.patch_values, config.width, use_bias=config.patch_bias, rngs=rngs, **kinds)
        if config.table_size:
            # As loud as the patches: a fresh tower is to see soon where things are, not only which colors there are.
            loud = nnx.initializers.normal(0.5)
            self.table = nnx.Embed(config.table_size, config.width, embedding_init=loud, rngs=rngs, **kinds)
        self.blocks = layers_lib.stack(lambda r: VisionBlock(config, rngs=r, **kinds), config.depth, rngs)
        self.merger = Merger(config, False, rngs=rngs, **kinds)
        if config.deepstack:
            self.deepstack = layers_lib.stack(
                lambda r: Merger(config, True, rngs=r, **kinds), len(config.deepstack), rngs
            )

    def _attend(self, batch: VisionBatch, index: jax.Array) -> Callable:
        """Attention of block `index`: in windows, but for the blocks that see whole images."""
        of = functools.partial(attend, implementation=self.attention, mesh=self.mesh)
        whole = functools.partial(of, layout=Segments(batch.segments, batch.starts, batch.lengths))
        if not self.config.window:
            return whole
        windows = functools.partial(of, layout=Segments(batch.windows, reach=self.config.window_patches))
        full = (jnp.array(self.config.full_blocks, jnp.int32) == index).any()

        # The scan keeps for its backward pass what either branch would need, so each keeps its inputs alone.
        def attention(q, k, v):
            return jax.lax.cond(full, jax.checkpoint(whole), jax.checkpoint(windows), q, k, v)

        return attention

    def __call__(self, batch: VisionBatch) -> tuple[jax.Array, jax.Array | None]:
        """Features [F, D] and DeepStack features [n, F, D] (None where the model has none)."""
        taken = jnp.array(self.config.deepstack, jnp.int32)
        x = self.patch(pixel_values(batch.patches, self.config))
        if self.config.table_size:
            table = jnp.asarray(self.table.embedding, self.dtype)[batch.table_index]
            x = x + (table * batch.table_weight[..., None]).sum(-2).astype(x.dtype)
        angles = vision_angles(batch.coordinates, self.config)

        def body(block, carry, index):
            x, kept = carry
            x = sharding.constrain(self.mesh, block(x, angles, self._attend(batch, index)))
            kept = jnp.where((taken == index)[:, None, None, None], x, kept)
            # Unless it is told, XLA splits what is kept by its width and moves it at every block.
            return (x, sharding.constrain(self.mesh, kept, leading=1)), None

        kept = jnp.zeros((len(self.config.deepstack), *x.shape), x.dtype)
        (x, kept), _ = layers_lib.scan(self.blocks, body, (x, kept), jnp.arange(self.config.depth), remat=self.remat)
        features = self.merger(x).reshape(-1, self.config.out_width)
        if not self.config.deepstack:
            return features, None
        _, deep = layers_lib.scan(self.deepstack, lambda merger, carry, x: (carry, merger(x)), None, kept)
        return features, deep.reshape(len(self.config.deepstack), -1, self.config.out_width)
