"""Our parameters' names and shapes <-> those of the published safetensors. One table serves reading and writing.

"{}" in a published name marks a stacked parameter: one published tensor for each index of our leading axis.
"""

from __future__ import annotations

import functools

import numpy as np

from capcur_jax.models.config import ModelConfig


def _suffix(kind: str) -> str:
    return "bias" if kind == "bias" else "weight"


def _linear(ours: str, theirs: str, kinds: tuple[str, ...] = ("kernel", "bias")) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{_suffix(kind)}" for kind in kinds}


def _decoder(root: str, qk_norm: bool, qkv_bias: bool) -> dict[str, str]:
    layer = root + "layers.{}."
    names = {
        "head.kernel": "lm_head.weight",
        "text.embed.embedding": root + "embed_tokens.weight",
        "text.norm.scale": root + "norm.weight",
        "text.layers.input_norm.scale": layer + "input_layernorm.weight",
        "text.layers.mlp_norm.scale": layer + "post_attention_layernorm.weight",
        "text.layers.o.kernel": layer + "self_attn.o_proj.weight",
    }
    for n in "qkv":
        names |= _linear(f"text.layers.{n}", layer + f"self_attn.{n}_proj", ("kernel", "bias")[: 1 + qkv_bias])
    for n in ("gate", "up", "down"):
        names |= _linear(f"text.layers.{n}", layer + f"mlp.{n}_proj", ("kernel",))
    if qk_norm:
        names |= {f"text.layers.{n}_norm.scale": layer + f"self_attn.{n}_norm.weight" for n in "qk"}
    return names


def _qwen3_vl() -> dict[str, str]:
    names, block = {}, "model.visual.blocks.{}."
    names |= _linear("visual.patch", "model.visual.patch_embed.proj")
    names |= {"visual.table.embedding": "model.visual.pos_embed.weight"}
    names |= _linear("visual.blocks.attention.qkv", block + "attn.qkv")
    names |= _linear("visual.blocks.attention.out", block + "attn.proj")
    names |= _linear("visual.blocks.up", block + "mlp.linear_fc1")
    names |= _linear("visual.blocks.down", block + "mlp.linear_fc2")
    for n in ("norm1", "norm2"):
        names |= _linear(f"visual.blocks.{n}", block + n, ("scale", "bias"))
    for ours, theirs in (
        ("visual.merger", "model.visual.merger"),
        ("visual.deepstack", "model.visual.deepstack_merger_list.{}"),
    ):
        names |= _linear(f"{ours}.norm", f"{theirs}.norm", ("scale", "bias"))
        names |= _linear(f"{ours}.up", f"{theirs}.linear_fc1")
        names |= _linear(f"{ours}.down", f"{theirs}.linear_fc2")
    return names | _decoder("model.language_model.", qk_norm=True, qkv_bias=False)


def _qwen2_5_vl() -> dict[str, str]:
    names, block = {}, "visual.blocks.{}."
    names |= _linear("visual.patch", "visual.patch_embed.proj", ("kernel",))
    names |= _linear("visual.blocks.attention.qkv", block + "attn.qkv")
    names |= _linear("visual.blocks.attention.out", block + "attn.proj")
    for n in ("gate", "up", "down"):
        names |= _linear(f"visual.blocks.{n}", block + f"mlp.{n}_proj")
    for n in ("norm1", "norm2"):
        names |= _linear(f"visual.blocks.{n}", block + n, ("scale",))
    names |= _linear("visual.merger.norm", "visual.merger.ln_q", ("scale",))
    names |= _linear("visual.merger.up", "visual.merger.mlp.0")
    names |= _linear("visual.merger.down", "visual.merger.mlp.2")
    return names | _decoder("model.", qk_norm=False, qkv_bias=True)


@functools.cache
def _of_family(family: str) -> dict[str, str]:
    return {"qwen3_vl": _qwen3_vl, "qwen2_5_vl": _qwen2_5_vl}[family]()


def table(config: ModelConfig) -> dict[str, str]:
    """Our dotted parameter path -> the name in the family's published safetensors."""
    return _of_family(config.family)


def published_shape(path: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Shape of one published tensor, from ours without the layer axis: kernels, and they alone, are transposed."""
    if path == "visual.patch.kernel":
        v = config.vision
        return (v.width, v.channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    return shape[::-1] if path.endswith(".kernel") else shape


def to_published(path: str, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
    """One of our tensors, without the layer axis, in the published shape."""
    shape = published_shape(path, tensor.shape, config)
    return np.ascontiguousarray(tensor.T if path.endswith(".kernel") else tensor).reshape(shape)
