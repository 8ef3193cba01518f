"""A Qwen-VL as one module: pure functions of arrays of static shape; every index comes from the host (inputs.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from capcur_jax.axes import Array, Float, checked
from capcur_jax.devices import sharding
from capcur_jax.models.attention import Packed, Places
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.lora import LoRA
from capcur_jax.models.rope import text_angles
from capcur_jax.models.text import Decoder, KeysValues
from capcur_jax.models.vision import VisionBatch, VisionTower


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A packed rows of W tokens, one for each device row, each with several groups: prompts and their responses (a
    sampler's have none), then padding."""

    tokens: Any  # [A, W] int32, image tokens expanded
    positions: Any  # [A, 3, W] int32: MRoPE time, height, width; responses go on from their prompt's max + 1
    visual_index: Any  # [A, W] int32 into the flat merged features (of the packed row), -1 at text tokens
    vision: VisionBatch | None  # None: no image in this batch
    places: Places
    prompt: int = dataclasses.field(metadata={"static": True})  # a bound on the tokens of a prompt
    response: int = dataclasses.field(metadata={"static": True})  # T, a bound on those of a response


class QwenVL(nnx.Module):
    """The model; its parameters lie on `mesh` as sharding.RULES say (None: on one device)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: str = "none",
        attention: str = "auto",
        mesh: Mesh | None = None,
        lora: LoRA | None = None,
        rngs: nnx.Rngs,
    ):
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        self.config, self.mesh = config, mesh or sharding.single()
        towers = dict(remat=remat, attention=attention, mesh=self.mesh, rngs=rngs, **kinds)
        self.visual = VisionTower(config.vision, **towers)
        self.text = Decoder(config.text, lora=lora, **towers)
        if not config.tied:
            self.head = nnx.Linear(config.text.width, config.text.vocabulary, use_bias=False, rngs=rngs, **kinds)

    def prefill(self, batch: PackedBatch) -> tuple[jax.Array, KeysValues]:
        """Final hidden states [A, W, D] and the keys and values of every layer."""
        return self.text.prefill(*self._inputs(batch), self._layout(batch))

    @staticmethod
    def _layout(batch: PackedBatch) -> Packed:
        return Packed(batch.places, batch.prompt, batch.response)

    def _inputs(self, batch: PackedBatch) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
        """The decoder's inputs: embeddings with images in them, angles, DeepStack features, their index."""
        h, deep, index = self.text.embedded(batch.tokens), None, None
        if batch.vision is not None:
            features, deep = self.visual(batch.vision)
            index = batch.visual_index
            h = jnp.where((index >= 0)[..., None], sharding.take(self.mesh, features, index).astype(h.dtype), h)
        angles = text_angles(jnp.moveaxis(batch.positions, 1, 0), self.config.text)
        return sharding.constrain(self.mesh, h), angles, deep, index

    def predicting(self, batch: PackedBatch) -> jax.Array:
        """The hidden states [A, W, D] that predict each response token: that of its prompt's last token for the first
        one, then that of the token before. At all other places they are anything.

        A group's prompt, image included, is computed once and equals full sequences in value and gradient.
        """
        h_AxWxD = self.text.packed(*self._inputs(batch), self._layout(batch))

        def before(h_AxWxD, places):
            A, W = h_AxWxD.shape[:2]
            last_AxB = places.prompt_start + places.prompt_length - 1
            last_AxR = jnp.repeat(last_AxB, places.response_start.shape[1] // last_AxB.shape[1], axis=1)
            index_AxW = jnp.broadcast_to(jnp.maximum(jnp.arange(W) - 1, 0), (A, W))
            first_AxR = jnp.where(places.response_length > 0, places.response_start, W)
            index_AxW = index_AxW.at[jnp.arange(A)[:, None], first_AxR].set(last_AxR, mode="drop")
            return jnp.take_along_axis(h_AxWxD, index_AxW[..., None], axis=1)

        rows = P(sharding.ROWS)
        return sharding.local(self.mesh, before, (rows, rows), rows)(h_AxWxD, batch.places)

    @staticmethod
    @checked
    def last(h_AxWxD: Float[Array, "A W D"], batch: PackedBatch) -> Float[Array, "A B D"]:
        """The hidden state [A, B, D] of each prompt's last token; anything where there is no prompt."""
        index = jnp.maximum(batch.places.prompt_start + batch.places.prompt_length - 1, 0)
        return jnp.take_along_axis(h_AxWxD, index[..., None], axis=1)

    def unembedding(self) -> tuple[jax.Array, int]:
        """The matrix that turns hidden states into logits, and the number of its vocabulary axis: the embedding
        [V, D] and 0 where it is tied, else the head's kernel [D, V] and 1."""
        return (self.text.embed.embedding[...], 0) if self.config.tied else (self.head.kernel[...], 1)

    def logits(self, h: jax.Array) -> jax.Array:
        """Float32 logits [..., V]."""
        kernel, axis = self.unembedding()
        equation = "...d,dv->...v" if axis else "...d,vd->...v"
        return jnp.einsum(equation, h, kernel.astype(h.dtype), preferred_element_type=jnp.float32)
