"""The architecture of a Qwen3-VL, read from a checkpoint's config.json (every published dense size)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from capcur_jax.errors import InputError

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


class UnsupportedCheckpoint(InputError):
    """The checkpoint asks for something this port does not have; the message names it."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `deepstack` holds 0-based block indices whose outputs feed the first decoder layers."""

    depth: int
    width: int
    mlp_width: int
    heads: int
    out_width: int
    patch_size: int
    table_size: int  # learned positions: a square grid of this many entries
    deepstack: tuple[int, ...]
    merge_size: int = 2
    temporal_patch_size: int = 2
    channels: int = 3
    activation: str = "gelu_pytorch_tanh"
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch: channels x temporal pair x pixels."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def table_side(self) -> int:
        return int(self.table_size**0.5)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. `mrope_sections` counts the rotary frequencies that follow time, height and width."""

    vocabulary: int
    width: int
    mlp_width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mrope_sections: tuple[int, int, int]
    rope_theta: float = 5e6
    rms_epsilon: float = 1e-6
    activation: str = "silu"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole model. `family` is its model_type; `published` the checkpoint's own config.json, which export writes back
    unchanged."""

    family: str
    vision: VisionConfig
    text: TextConfig
    tied: bool
    image_token: int
    published: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False, compare=False, repr=False)


def _need(section: dict, key: str, where: str):
    if key not in section:
        raise UnsupportedCheckpoint(f"{where}: the key '{key}' is missing; is this a Qwen3-VL config.json?")
    return section[key]


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"{where}: hidden_act '{name}' is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return name


def _vision(section: dict, where: str) -> VisionConfig:
    rope = section.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UnsupportedCheckpoint(f"{where}: vision rope_type '{rope['rope_type']}' is not supported")
    config = VisionConfig(
        depth=_need(section, "depth", where),
        width=_need(section, "hidden_size", where),
        mlp_width=_need(section, "intermediate_size", where),
        heads=_need(section, "num_heads", where),
        out_width=_need(section, "out_hidden_size", where),
        patch_size=_need(section, "patch_size", where),
        table_size=_need(section, "num_position_embeddings", where),
        deepstack=tuple(_need(section, "deepstack_visual_indexes", where)),
        merge_size=section.get("spatial_merge_size", 2),
        temporal_patch_size=section.get("temporal_patch_size", 2),
        channels=section.get("in_channels", 3),
        activation=_activation(section.get("hidden_act", "gelu_pytorch_tanh"), where),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
    if config.table_side**2 != config.table_size:
        raise UnsupportedCheckpoint(f"{where}: num_position_embeddings {config.table_size} is not a square")
    if any(not 0 <= index < config.depth for index in config.deepstack) or list(config.deepstack) != sorted(
        set(config.deepstack)
    ):
        raise UnsupportedCheckpoint(
            f"{where}: deepstack_visual_indexes {list(config.deepstack)} must rise and lie in 0..{config.depth - 1}"
        )
    return config


def _text(section: dict, where: str) -> TextConfig:
    # transformers >= 5 writes rope_parameters; the published files have rope_theta and rope_scaling beside it.
    rope = {**(section.get("rope_scaling") or {}), **(section.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise UnsupportedCheckpoint(f"{where}: text rope_type '{kind}' is not supported, only 'default'")
    if section.get("attention_bias", False):
        raise UnsupportedCheckpoint(f"{where}: attention_bias is not part of Qwen3-VL's decoder")
    if not rope.get("mrope_interleaved", True):
        raise UnsupportedCheckpoint(f"{where}: Qwen3-VL's MRoPE is interleaved; mrope_interleaved is false here")
    heads = _need(section, "num_attention_heads", where)
    head_dim = section.get("head_dim") or 128
    sections = tuple(rope.get("mrope_section", (24, 20, 20)))
    if len(sections) != 3 or sum(sections) != head_dim // 2:
        raise UnsupportedCheckpoint(
            f"{where}: mrope_section {list(sections)} must be three numbers of sum head_dim / 2 = {head_dim // 2}"
        )
    return TextConfig(
        vocabulary=_need(section, "vocab_size", where),
        width=_need(section, "hidden_size", where),
        mlp_width=_need(section, "intermediate_size", where),
        depth=_need(section, "num_hidden_layers", where),
        heads=heads,
        kv_heads=_need(section, "num_key_value_heads", where) or heads,
        head_dim=head_dim,
        mrope_sections=sections,
        rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else _need(section, "rope_theta", where)),
        rms_epsilon=float(section.get("rms_norm_eps", 1e-6)),
        activation=_activation(section.get("hidden_act", "silu"), where),
    )


def from_dict(published: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """`published`: a parsed config.json. Raises `UnsupportedCheckpoint` naming what is missing or not supported."""
    kind = published.get("model_type")
    if kind != "qwen3_vl":
        raise UnsupportedCheckpoint(f"{where}: model_type '{kind}' is not supported; supported: 'qwen3_vl'")
    text = _text(_need(published, "text_config", where), f"{where} text_config")
    vision = _vision(_need(published, "vision_config", where), f"{where} vision_config")
    if vision.out_width != text.width:
        raise UnsupportedCheckpoint(
            f"{where}: vision out_hidden_size {vision.out_width} differs from the decoder's hidden_size {text.width}"
        )
    if len(vision.deepstack) > text.depth:
        raise UnsupportedCheckpoint(f"{where}: more DeepStack features than decoder layers")
    return ModelConfig(
        family=kind,
        vision=vision,
        text=text,
        tied=bool(published.get("tie_word_embeddings", published["text_config"].get("tie_word_embeddings", False))),
        image_token=published.get("image_token_id", 151655),
        published=published,
    )


def from_directory(directory: str | Path) -> ModelConfig:
    """Reads DIRECTORY/config.json. Raises UnsupportedCheckpoint naming the directory and what belongs in it."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UnsupportedCheckpoint(
            f"{path} does not exist: config.checkpoint must name a Hugging Face checkpoint directory "
            "(config.json, *.safetensors, tokenizer files, preprocessor_config.json)"
        )
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedCheckpoint(f"{path} is not valid JSON ({error}); copy the file again") from None
    return from_dict(published, str(path))
