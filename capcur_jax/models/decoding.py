"""The decoder as a sampler reads it: weights of one array a layer in the type of the computation, one token a row.

Training keeps layers in stacks, which a scan cuts: while decoding each cut would copy a layer for every token. So the
layers stand one by one here, and the copy is made once for each version of the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capcur_jax.axes import Array, Bool, Float, Int, checked
from capcur_jax.devices import sharding
from capcur_jax.models import paged
from capcur_jax.models.paged import Pages, Tables
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.models.rope import text_angles

_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")  # the rest is small and keeps its type


class Weights(NamedTuple):
    """What decoding reads."""

    embedding: jax.Array  # [V, D]
    layers: tuple[nnx.State, ...]  # of each layer
    norm: nnx.State  # the last one
    head: jax.Array | None  # [D, V]; None: the embedding


class DecodingModel:
    """A `QwenVL` for one token a row.

    Args:
        model: gives the architecture, the mesh and the types.
        gathered: whether each device row has all weights, split over `tensor` alone; else they lie as the parameters
            do, and every token gathers them.
    """

    def __init__(self, model: QwenVL, *, gathered: bool):
        self.config, self.mesh, self.dtype = model.config, model.mesh, model.text.dtype
        self.attention, self.gathered = model.text.attention, gathered
        self._layer, self._norm = nnx.split(model.text.layers)[0], nnx.split(model.text.norm)[0]
        self._programs: Any = None

    # ------------------------------------------------------------------ weights

    def weights(self, parameters: nnx.State) -> Weights:
        """A copy of what decoding reads of the parameters, made a layer at a time: no third copy is on the way."""
        if self._programs is None:
            places = self._places(parameters)
            one = jax.jit(self._one, out_shardings=places.layers[0])
            self._programs = one, jax.jit(self._rest, out_shardings=places._replace(layers=()))
        one, rest = self._programs
        stacked = parameters["text"]["layers"]
        layers = tuple(one(stacked, np.int32(i)) for i in range(self.config.text.depth))
        return rest(parameters)._replace(layers=layers)

    def abstract_weights(self, parameters: nnx.State) -> Weights:
        """The same by shape and place alone, for a plan."""
        at = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        layer = jax.eval_shape(self._one, parameters["text"]["layers"], np.int32(0))
        shapes = jax.eval_shape(self._rest, parameters)._replace(layers=(layer,) * self.config.text.depth)
        return jax.tree.map(at, shapes, self._places(parameters))

    def _one(self, stacked: nnx.State, number: jax.Array) -> nnx.State:
        """A layer of the stack."""
        return self._cast(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stacked))

    def _rest(self, parameters: nnx.State) -> Weights:
        text = parameters["text"]
        head = None if self.config.tied else self._cast(parameters["head"])["kernel"][...]
        return Weights(self._cast(text["embed"])["embedding"][...], (), jax.tree.map(jnp.copy, text["norm"]), head)

    def _cast(self, state: nnx.State) -> nnx.State:
        flat = nnx.to_flat_state(state)
        wanted = [self.dtype if path[-1] in _MATRICES else leaf.dtype for path, leaf in flat]
        return nnx.from_flat_state(
            [(path, leaf.replace(leaf[...].astype(dtype))) for (path, leaf), dtype in zip(flat, wanted, strict=True)]
        )

    def _spec(self, path: str, shape) -> P:
        spec = sharding.spec_of(self.mesh, path, shape)
        return P(*(axis if axis == "tensor" or not self.gathered else None for axis in spec))

    def _places(self, parameters: nnx.State) -> Weights:
        def place(path: str, shape, cut: int = 0) -> NamedSharding:
            return NamedSharding(self.mesh, P(*self._spec(path, shape)[cut:]))

        def of(prefix: str, state: nnx.State, cut: int = 0) -> nnx.State:
            flat = nnx.to_flat_state(state)
            return nnx.from_flat_state(
                [(p, leaf.replace(place(".".join((prefix, *map(str, p))), leaf.shape, cut))) for p, leaf in flat]
            )

        text = parameters["text"]
        head = None if self.config.tied else place("head.kernel", parameters["head"]["kernel"].shape)
        layers = (of("text.layers", text["layers"], 1),) * self.config.text.depth
        embedding = place("text.embed.embedding", text["embed"]["embedding"].shape)
        return Weights(embedding, layers, of("text.norm", text["norm"]), head)

    # ------------------------------------------------------------------ a token

    def empty_pages(self, pages: int, size: int) -> Pages:
        """So many pages of `size` tokens, with nothing in them."""
        text = self.config.text
        return paged.empty(text.depth, (text.kv_heads, pages, size, text.head_dim), self.dtype)

    def pages_places(self) -> Pages:
        """Where they lie."""
        place = NamedSharding(self.mesh, paged.SPEC)
        return ((place, place),) * self.config.text.depth

    @checked
    def step(
        self,
        weights: Weights,
        pages: Pages,
        tokens_C: Int[Array, " C"],
        positions_C: Int[Array, " C"],
        at_C: Int[Array, " C"],
        live_C: Bool[Array, " C"],
        tables: Tables,
    ) -> tuple[Float[Array, "C V"], Pages]:
        """Logits [C, V] float32 behind a token of every row, and the pages with it.

        Args:
            positions_C: of the tokens, for the rotary embedding.
            at_C: which place of the row's pages is the token's; it sees those up to it.
            live_C: what others compute is anything, and they read and write no page.
        """
        spec = self._spec("text.embed.embedding", weights.embedding.shape)
        h = sharding.lookup(self.mesh, weights.embedding, tokens_C[:, None], spec).astype(self.dtype)
        angles = text_angles(jnp.broadcast_to(positions_C[:, None], (3, len(positions_C), 1)), self.config.text)
        lengths, filled = jnp.where(live_C, at_C + 1, 0), []
        for state, mine in zip(weights.layers, pages, strict=True):
            layer = nnx.merge(self._layer, state)
            q, k, v = layer.qkv(h, angles)
            filled.append(paged.write(self.mesh, mine, k[:, 0], v[:, 0], tables, at_C, live_C))
            own = paged.attend(q[:, 0], filled[-1], tables, lengths, self.mesh, self.attention)
            h = sharding.constrain(self.mesh, layer.finish(h, own[:, None]))
        h = nnx.merge(self._norm, weights.norm)(h)[:, 0]
        kernel, equation = (weights.embedding, "cd,vd->cv") if weights.head is None else (weights.head, "cd,dv->cv")
        logits = jnp.einsum(equation, h, kernel.astype(h.dtype), preferred_element_type=jnp.float32)
        return logits, tuple(filled)
