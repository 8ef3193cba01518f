"""The architecture of a Qwen2.5-VL or Qwen3-VL, read from a checkpoint's config.json (every published dense size)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capcur_jax.errors import InputError

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
UNSUPPORTED = {
    "qwen3_vl_moe": "a mixture of experts",
    "qwen3_omni_moe": "a mixture of experts with audio",
    "qwen2_vl": "Qwen2-VL, the generation before windows",
    "qwen2_5_omni": "audio",
}
# Of transformers' image processor of both families, where a checkpoint's file leaves them out.
IMAGE_DEFAULTS = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
    "rescale_factor": 1 / 255,
}  # fmt: skip
# Older writers leave out what equals the defaults of transformers' configuration classes; these are those.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_5_vl": {
        "vision": {
            "depth": 32, "hidden_size": 3584, "hidden_act": "silu", "intermediate_size": 3420, "num_heads": 16,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "out_hidden_size": 3584, "fullatt_block_indexes": (7, 15, 23, 31),
        },
        "text": {
            "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        },
    },
    "qwen3_vl": {
        "vision": {
            "depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304,
            "num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "out_hidden_size": 3584, "num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24),
        },
        "text": {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
        },
    },
}  # fmt: skip


class UnsupportedCheckpoint(InputError):
    """The checkpoint asks for something this port does not have; the message names it."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Block indices are 0-based.

    `deepstack`: blocks whose outputs feed the first decoder layers (Qwen3-VL). `table_size`: entries of the square grid
    of learned positions, 0 for none. `window`: side of an attention window in merged features, 0 for none; the blocks
    of `full_blocks` see whole images all the same (Qwen2.5-VL). `rescale`, `mean`, `std`: a byte of a channel counts
    (byte x rescale - mean) / std.
    """

    depth: int
    width: int
    mlp_width: int
    heads: int
    out_width: int
    patch_size: int
    table_size: int = 0
    deepstack: tuple[int, ...] = ()
    window: int = 0
    full_blocks: tuple[int, ...] = ()
    merge_size: int = 2
    temporal_patch_size: int = 2
    channels: int = 3
    activation: str = "gelu_pytorch_tanh"
    gated: bool = False  # SwiGLU instead of two layers
    rms_norm: bool = False  # instead of LayerNorm
    patch_bias: bool = True
    rope_theta: float = 10000.0
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch: channels x temporal pair x pixels."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patch_bytes(self) -> int:
        """Bytes of one patch of a still image, whose frames are all the same: channels x pixels."""
        return self.channels * self.patch_size**2

    @property
    def table_side(self) -> int:
        return int(self.table_size**0.5)

    @property
    def window_patches(self) -> int:
        """The most patches that a window holds; 0: no windows."""
        return (self.window * self.merge_size) ** 2


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
    mrope_interleaved: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
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
        raise UnsupportedCheckpoint(f"{where}: the key '{key}' is missing; is this a Qwen-VL config.json?")
    return section[key]


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"{where}: hidden_act '{name}' is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return name


def _blocks(section: dict, key: str, where: str) -> tuple[int, ...]:
    blocks, depth = tuple(section[key]), section["depth"]
    if list(blocks) != sorted(set(blocks)) or any(not 0 <= index < depth for index in blocks):
        raise UnsupportedCheckpoint(f"{where}: {key} {list(blocks)} must rise and lie in 0..{depth - 1}")
    return blocks


def _vision(section: dict, family: str, where: str) -> VisionConfig:
    section = {**DEFAULTS[family]["vision"], **section}
    rope = section.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise UnsupportedCheckpoint(f"{where}: vision rope_type '{rope['rope_type']}' is not supported")
    patch, merge = section["patch_size"], section["spatial_merge_size"]
    shared = dict(
        depth=section["depth"],
        width=section["hidden_size"],
        mlp_width=section["intermediate_size"],
        heads=section["num_heads"],
        out_width=section["out_hidden_size"],
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=section["temporal_patch_size"],
        channels=section.get("in_channels", section.get("in_chans", 3)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
    if family == "qwen2_5_vl":
        side = section["window_size"]
        if side < patch * merge:
            raise UnsupportedCheckpoint(
                f"{where}: window_size {side} is smaller than a merged feature ({patch * merge})"
            )
        return VisionConfig(
            **shared,
            window=side // (patch * merge),
            full_blocks=_blocks(section, "fullatt_block_indexes", where),
            activation=_activation(section["hidden_act"], where),
            gated=True,
            rms_norm=True,
            patch_bias=False,
            mean=IMAGE_DEFAULTS["image_mean"],
            std=IMAGE_DEFAULTS["image_std"],
        )
    config = VisionConfig(
        **shared,
        table_size=section["num_position_embeddings"],
        deepstack=_blocks(section, "deepstack_visual_indexes", where),
        activation=_activation(section["hidden_act"], where),
    )
    if config.table_side**2 != config.table_size:
        raise UnsupportedCheckpoint(f"{where}: num_position_embeddings {config.table_size} is not a square")
    return config


def _text(section: dict, family: str, where: str) -> TextConfig:
    section = {**DEFAULTS[family]["text"], **section}
    # transformers >= 5 writes rope_parameters; the published files have rope_theta and rope_scaling beside it.
    rope = {**(section.get("rope_scaling") or {}), **(section.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise UnsupportedCheckpoint(f"{where}: text rope_type '{kind}' is not supported, only 'default'")
    newer = family == "qwen3_vl"
    if newer and section.get("attention_bias", False):
        raise UnsupportedCheckpoint(f"{where}: attention_bias is not part of Qwen3-VL's decoder")
    if section.get("use_sliding_window", False):
        raise UnsupportedCheckpoint(f"{where}: use_sliding_window is not supported; no published size uses it")
    if rope.get("mrope_interleaved", newer) != newer:
        raise UnsupportedCheckpoint(f"{where}: mrope_interleaved must be {str(newer).lower()} for {family}")
    heads, width = section["num_attention_heads"], section["hidden_size"]
    head_dim = section.get("head_dim") or width // heads
    sections = tuple(rope.get("mrope_section", (24, 20, 20) if newer else (16, 24, 24)))
    if len(sections) != 3 or sum(sections) != head_dim // 2:
        raise UnsupportedCheckpoint(
            f"{where}: mrope_section {list(sections)} must be three numbers of sum head_dim / 2 = {head_dim // 2}"
        )
    return TextConfig(
        vocabulary=section["vocab_size"],
        width=width,
        mlp_width=section["intermediate_size"],
        depth=section["num_hidden_layers"],
        heads=heads,
        kv_heads=section["num_key_value_heads"] or heads,
        head_dim=head_dim,
        mrope_sections=sections,
        mrope_interleaved=newer,
        qk_norm=newer,
        qkv_bias=not newer,
        rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else _need(section, "rope_theta", where)),
        rms_epsilon=float(section["rms_norm_eps"]),
        activation=_activation(section["hidden_act"], where),
    )


def from_dict(published: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """`published`: a parsed config.json. Raises `UnsupportedCheckpoint` naming what is missing or not supported."""
    family = published.get("model_type")
    if family in UNSUPPORTED:
        raise UnsupportedCheckpoint(f"{where}: model_type '{family}' ({UNSUPPORTED[family]}) is not supported")
    if family not in FAMILIES:
        raise UnsupportedCheckpoint(
            f"{where}: model_type '{family}' is not supported; supported: {', '.join(map(repr, FAMILIES))}"
        )
    # The published Qwen2.5-VL files keep the decoder's keys at the top; newer writers nest them as Qwen3-VL does.
    flat = family == "qwen2_5_vl" and "text_config" not in published
    section, place = (published, where) if flat else (_need(published, "text_config", where), f"{where} text_config")
    text = _text(section, family, place)
    vision = _vision(_need(published, "vision_config", where), family, f"{where} vision_config")
    if vision.out_width != text.width:
        raise UnsupportedCheckpoint(
            f"{where}: vision out_hidden_size {vision.out_width} differs from the decoder's hidden_size {text.width}"
        )
    if len(vision.deepstack) > text.depth:
        raise UnsupportedCheckpoint(f"{where}: more DeepStack features than decoder layers")
    return ModelConfig(
        family=family,
        vision=vision,
        text=text,
        # As transformers has it: of Qwen3-VL's files the top-level key alone counts, of Qwen2.5-VL's either one.
        tied=any(part.get("tie_word_embeddings") for part in (published, section if family == "qwen2_5_vl" else {})),
        image_token=published.get("image_token_id", 151655),
        published=published,
    )


def from_directory(directory: str | Path) -> ModelConfig:
    """Reads DIRECTORY/config.json. Raises UnsupportedCheckpoint naming the directory and what belongs in it."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UnsupportedCheckpoint(
            f"{path} does not exist: config.checkpoint must name a Hugging Face checkpoint directory "
            "(config.json, *.safetensors, tokenizer files, preprocessor_config.json), or OWNER/NAME of one on the Hub"
        )
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedCheckpoint(f"{path} is not valid JSON ({error}); copy the file again") from None
    config = from_dict(published, str(path))
    settings = _image_settings(Path(directory))
    if settings is None:
        return config
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **byte_values(settings)))


def _image_settings(directory: Path) -> dict[str, Any] | None:
    """Those of the checkpoint's image processor; None: it has no file of them. Raises InputError."""
    # Newer writers nest them, and those count first, as for transformers.
    for name, section in (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")):
        if not (directory / name).is_file():
            continue
        try:
            found = json.loads((directory / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{directory}: {name} is not usable ({error}); copy it again") from None
        if not section or section in found:
            return found.get(section) if section else found
    return None


def byte_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`rescale`, `mean` and `std` of VisionConfig, by the settings of an image processor, which may give one number for
    all colors."""

    def of(key: str) -> Any:
        value = settings.get(key)
        return IMAGE_DEFAULTS[key] if value is None else value

    def colors(key: str) -> tuple[float, ...]:
        value = of(key)
        return tuple(map(float, [value] * 3 if isinstance(value, int | float) else value))

    normal = settings.get("do_normalize", True)
    return {
        "rescale": float(of("rescale_factor")) if settings.get("do_rescale", True) else 1.0,
        "mean": colors("image_mean") if normal else (0.0, 0.0, 0.0),
        "std": colors("image_std") if normal else (1.0, 1.0, 1.0),
    }


DTYPES = ("float32", "bfloat16")


def dtype_of(name: str, key: str):
    if name not in DTYPES:
        raise InputError(f"{key} = {name!r}; choose one of {', '.join(DTYPES)}")
    import jax.numpy as jnp  # here: data commands read a model's config without JAX

    return jnp.dtype(name)
