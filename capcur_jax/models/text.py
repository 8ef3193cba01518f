"""The decoder: grouped-query attention with QK-norm (Qwen3-VL) or biases (Qwen2.5-VL), SwiGLU, and DeepStack features
added after the first layers (Qwen3-VL)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from capcur_jax.devices import sharding
from capcur_jax.models import layers as layers_lib
from capcur_jax.models import lora as lora_lib
from capcur_jax.models.attention import Packed, attend
from capcur_jax.models.config import TextConfig
from capcur_jax.models.lora import LoRA
from capcur_jax.models.rope import rotate


class KeysValues(NamedTuple):
    """Keys and values of every layer: [L, A, S, K, H] each."""

    keys: jax.Array
    values: jax.Array


def _same(x: jax.Array) -> jax.Array:
    return x


class DecoderLayer(nnx.Module):
    def __init__(self, config: TextConfig, dtype, param_dtype, rngs: nnx.Rngs, lora=None):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        plain = dict(use_bias=False, **kinds)
        norm = dict(epsilon=config.rms_epsilon, **kinds)
        self.head_dim, self.activation = config.head_dim, config.activation
        self.input_norm = nnx.RMSNorm(config.width, **norm)
        bias = dict(use_bias=config.qkv_bias, **kinds)
        linear = functools.partial(lora_lib.linear, lora)
        self.q = linear("q", config.width, config.heads * config.head_dim, **bias)
        self.k = linear("k", config.width, config.kv_heads * config.head_dim, **bias)
        self.v = linear("v", config.width, config.kv_heads * config.head_dim, **bias)
        self.o = linear("o", config.heads * config.head_dim, config.width, **plain)
        self.q_norm = nnx.RMSNorm(config.head_dim, **norm) if config.qk_norm else _same
        self.k_norm = nnx.RMSNorm(config.head_dim, **norm) if config.qk_norm else _same
        self.mlp_norm = nnx.RMSNorm(config.width, **norm)
        self.gate = linear("gate", config.width, config.mlp_width, **plain)
        self.up = linear("up", config.width, config.mlp_width, **plain)
        self.down = linear("down", config.mlp_width, config.width, **plain)

    def qkv(self, h_AxTxD: jax.Array, angles: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [A, T, N, H], rotated keys and values [A, T, K, H]."""
        x = self.input_norm(h_AxTxD)
        shape = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q(x).reshape(shape)), angles)
        k = rotate(self.k_norm(self.k(x).reshape(shape)), angles)
        return q, k, self.v(x).reshape(shape)

    def finish(self, h_AxTxD: jax.Array, attended_AxTxNxH: jax.Array) -> jax.Array:
        """The residual stream after attention and MLP."""
        h = h_AxTxD + self.o(attended_AxTxNxH.reshape(*h_AxTxD.shape[:2], -1))
        x = self.mlp_norm(h)
        return h + self.down(layers_lib.ACTIVATION[self.activation](self.gate(x)) * self.up(x))


class Decoder(nnx.Module):
    def __init__(
        self,
        config: TextConfig,
        dtype,
        param_dtype,
        remat: str,
        attention: str,
        mesh: Mesh,
        rngs: nnx.Rngs,
        lora: LoRA | None = None,
    ):
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        self.config, self.remat, self.attention, self.mesh, self.dtype = config, remat, attention, mesh, dtype
        self.embed = nnx.Embed(
            config.vocabulary, config.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs, **kinds
        )
        self.layers = layers_lib.stack(lambda r: DecoderLayer(config, rngs=r, lora=lora, **kinds), config.depth, rngs)
        self.norm = nnx.RMSNorm(config.width, epsilon=config.rms_epsilon, rngs=rngs, **kinds)

    def embedded(self, tokens_AxT: jax.Array) -> jax.Array:
        """The tokens' embeddings [A, T, D]."""
        return sharding.lookup(self.mesh, self.embed.embedding[...], tokens_AxT).astype(self.dtype)

    def _attend(self, q, k, v, layout) -> jax.Array:
        return attend(q, k, v, layout, self.mesh, self.attention)

    def prefill(
        self,
        h_AxWxD: jax.Array,
        angles: jax.Array,
        deep: jax.Array | None,
        visual_index_AxW: jax.Array | None,
        layout: Packed,
    ) -> tuple[jax.Array, KeysValues]:
        """A pass over packed rows: [A, W, D], and their keys and values. `deep` [n, F, D] is added at image tokens
        after the first n layers."""
        h, cache = self._pass(h_AxWxD, angles, deep, visual_index_AxW, layout, KeysValues)
        return self.norm(h), cache

    def packed(
        self,
        h_AxWxD: jax.Array,
        angles: jax.Array,
        deep: jax.Array | None,
        visual_index_AxW: jax.Array | None,
        layout: Packed,
    ) -> jax.Array:
        """The same where nobody needs the keys and values: [A, W, D]."""
        h, _ = self._pass(h_AxWxD, angles, deep, visual_index_AxW, layout, lambda k, v: None)
        return self.norm(h)

    def _pass(
        self,
        h_AxTxD: jax.Array,
        angles: jax.Array,
        deep: jax.Array | None,
        visual_index_AxT: jax.Array | None,
        layout: Packed,
        kept: Callable[[jax.Array, jax.Array], Any],
    ) -> tuple[jax.Array, Any]:
        def body(layer, h, index):
            q, k, v = layer.qkv(h, angles)
            h = layer.finish(h, self._attend(q, k, v, layout))
            if deep is not None:
                h = self._shown(h, deep, visual_index_AxT, index)
            return sharding.constrain(self.mesh, h), kept(k, v)

        return layers_lib.scan(self.layers, body, h_AxTxD, jnp.arange(self.config.depth), remat=self.remat)

    def _shown(self, h_AxTxD, deep, visual_index_AxT, index) -> jax.Array:
        """With the DeepStack features of layer `index` added at image tokens."""
        # The same body serves every layer: past the last feature the addend is masked away.
        feature = deep[jnp.minimum(index, deep.shape[0] - 1)]
        shown = (visual_index_AxT >= 0) & (index < deep.shape[0])
        here = sharding.take(self.mesh, feature, visual_index_AxT)
        return h_AxTxD + jnp.where(shown[..., None], here, 0).astype(h_AxTxD.dtype)
