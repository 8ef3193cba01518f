"""config.json in its published forms, what is refused and how it is named, the published parameter counts."""

from __future__ import annotations

import copy
import json

import jax
import pytest
from flax import nnx

from capcur_jax.errors import InputError
from capcur_jax.models import published
from capcur_jax.models.config import UnsupportedCheckpoint, from_dict, from_directory
from capcur_jax.models.qwen_vl import QwenVL

PUBLISHED, WINDOWED = published.config("qwen3_vl_8b"), published.config("qwen2_5_vl_7b")
BILLIONS = {
    "qwen2_5_vl_3b": 3.755, "qwen2_5_vl_7b": 8.292, "qwen2_5_vl_32b": 33.453, "qwen2_5_vl_72b": 73.411,
    "qwen3_vl_2b": 2.128, "qwen3_vl_4b": 4.438, "qwen3_vl_8b": 8.767, "qwen3_vl_32b": 33.357,
}  # fmt: skip


def changed(section: str = "", *, without: str = "", of: dict = PUBLISHED, **values) -> dict:
    """A published file with some values changed (or one key left out) at the top or in a section."""
    config = copy.deepcopy(of)
    target = config[section] if section else config
    target.update(values)
    target.pop(without, None)
    return config


def test_the_published_file_is_read():
    config = from_dict(PUBLISHED)
    text, vision = config.text, config.vision
    assert (text.rope_theta, text.mrope_sections, text.head_dim, text.kv_heads) == (5e6, (24, 20, 20), 128, 8)
    assert (vision.table_side, vision.head_dim, vision.patch_values) == (48, 72, 1536)
    assert (vision.deepstack, config.tied, config.image_token) == ((8, 16, 24), False, 151655)
    assert config.published == PUBLISHED


def test_the_published_file_of_qwen2_5_vl_is_read():
    config = from_dict(WINDOWED)
    text, vision = config.text, config.vision
    assert (text.rope_theta, text.mrope_sections, text.head_dim, text.kv_heads) == (1e6, (16, 24, 24), 128, 4)
    assert (text.mrope_interleaved, text.qk_norm, text.qkv_bias) == (False, False, True)
    assert (vision.window, vision.window_patches, vision.full_blocks) == (4, 64, (7, 15, 23, 31))
    assert (vision.table_size, vision.deepstack, vision.head_dim, vision.patch_values) == (0, (), 80, 1176)
    assert (config.tied, config.image_token, config.published) == (False, 151655, WINDOWED)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_what_is_left_out_is_the_default_of_transformers(family):
    """Older writers leave out what equals the defaults of the configuration classes."""
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    kind = {"qwen3_vl": Qwen3VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}[family]
    whole = kind().to_dict()
    whole["vision_config"]["out_hidden_size"] = whole["text_config"]["hidden_size"]
    sections = (whole["text_config"]["head_dim"] if family == "qwen3_vl" else 128) // 8
    rope = {"rope_type": "default", "mrope_section": [sections * 2, sections, sections], "rope_theta": 1e6}
    whole["text_config"]["rope_parameters"] = rope
    bare = {
        "model_type": family,
        "text_config": {"rope_parameters": rope},
        "vision_config": {"out_hidden_size": whole["text_config"]["hidden_size"]},
    }
    assert from_dict(bare) == from_dict(whole)


@pytest.mark.parametrize(("top", "nested", "qwen3", "qwen2_5"), [
    (True, None, True, True), (None, True, False, True), (False, True, False, True), (False, False, False, False),
])  # fmt: skip
def test_which_key_ties_the_embeddings(tmp_path, top, nested, qwen3, qwen2_5):
    """As transformers 5.23 reads the two keys."""
    nested_keys = {key: value for key, value in WINDOWED.items() if key not in ("vision_config", "model_type")}
    newer = {**WINDOWED, "text_config": nested_keys}
    for whole, tied in ((copy.deepcopy(PUBLISHED), qwen3), (copy.deepcopy(newer), qwen2_5)):
        for section, value in ((whole, top), (whole["text_config"], nested)):
            section.pop("tie_word_embeddings", None)
            section.update({} if value is None else {"tie_word_embeddings": value})
        assert from_dict(whole).tied == tied


def test_old_and_new_rope_keys_mean_the_same():
    new = changed("text_config", without="rope_scaling")
    del new["text_config"]["rope_theta"]
    new["text_config"]["rope_parameters"] = {
        "rope_theta": 5000000, "rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True,
    }  # fmt: skip
    new["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    assert from_dict(new) == from_dict(PUBLISHED)


def test_what_transformers_writes_of_qwen2_5_vl_means_the_same(tmp_path):
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig(**copy.deepcopy(WINDOWED)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "hidden_size" in written["text_config"] and "hidden_size" not in written
    assert from_directory(tmp_path) == from_dict(WINDOWED)


def test_what_transformers_writes_means_the_same(tmp_path):
    from transformers import Qwen3VLConfig

    Qwen3VLConfig(**copy.deepcopy(PUBLISHED)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in written["text_config"] and "rope_theta" not in written["text_config"]
    assert from_directory(tmp_path) == from_dict(PUBLISHED)


def test_the_checkpoints_own_rope_theta_is_used():
    assert from_dict(changed("text_config", rope_theta=12345.0)).text.rope_theta == 12345.0
    assert from_dict(changed("vision_config", rope_parameters={"rope_theta": 99.0})).vision.rope_theta == 99.0


YARN = {"rope_type": "yarn", "factor": 2.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
CHUNKED = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": False}
REFUSED = [
    (changed(model_type="llava"), r"config\.json: model_type 'llava' is not supported.*'qwen2_5_vl', 'qwen3_vl'"),
    (changed(model_type="qwen3_vl_moe"), r"model_type 'qwen3_vl_moe' \(a mixture of experts\) is not supported"),
    (changed(model_type="qwen2_vl"), r"model_type 'qwen2_vl' \(Qwen2-VL, the generation before windows\)"),
    (changed(without="model_type"), "model_type 'None'"),
    (changed(without="text_config"), "'text_config' is missing"),
    (changed("text_config", without="rope_theta"), "'rope_theta' is missing"),
    (changed("text_config", hidden_act="relu"), "text_config: hidden_act 'relu' is not supported.*silu"),
    (changed("vision_config", hidden_act="quick_gelu"), "vision_config: hidden_act 'quick_gelu' is not supported"),
    (changed("text_config", attention_bias=True), "attention_bias"),
    (changed("text_config", rope_scaling=YARN), "text rope_type 'yarn' is not supported"),
    (changed("text_config", rope_scaling=CHUNKED), "mrope_interleaved must be true for qwen3_vl"),
    (changed("text_config", head_dim=96), r"mrope_section \[24, 20, 20\] .* 48"),
    (changed("vision_config", rope_parameters={"rope_type": "linear"}), "vision rope_type 'linear'"),
    (changed("vision_config", num_position_embeddings=2300), "num_position_embeddings 2300 is not a square"),
    (changed("vision_config", deepstack_visual_indexes=[8, 16, 27]), r"deepstack_visual_indexes \[8, 16, 27\]"),
    (changed("vision_config", deepstack_visual_indexes=[16, 8]), r"deepstack_visual_indexes \[16, 8\] must rise"),
    (changed("vision_config", out_hidden_size=3584), "out_hidden_size 3584 differs from .* hidden_size 4096"),
    (changed(of=WINDOWED, without="vision_config"), "'vision_config' is missing"),
    (changed(of=WINDOWED, use_sliding_window=True), "use_sliding_window is not supported"),
    (changed(of=WINDOWED, rope_scaling={"type": "yarn"}), "text rope_type 'yarn' is not supported"),
    (changed(of=WINDOWED, rope_scaling=YARN | {"rope_type": "default"}), "mrope_interleaved must be false for qwen2_5"),
    (changed("vision_config", of=WINDOWED, fullatt_block_indexes=[7, 32]), r"fullatt_block_indexes \[7, 32\]"),
    (changed("vision_config", of=WINDOWED, window_size=20), "window_size 20 is smaller than a merged feature"),
    (changed("text_config", num_hidden_layers=2), "more DeepStack features than decoder layers"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_supported_is_refused_by_name(content, message):
    with pytest.raises(UnsupportedCheckpoint, match=message):
        from_dict(content)


@pytest.mark.parametrize("name", published.NAMES)
def test_parameter_counts_equal_the_published_totals(name):
    config = from_dict(published.config(name))
    state = nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e9, 3) == BILLIONS[name]


def test_a_published_config_is_the_callers_own():
    published.config("qwen3_vl_8b")["vision_config"]["deepstack_visual_indexes"].append(26)
    assert published.config("qwen3_vl_8b") == PUBLISHED


def test_an_unpublished_architecture_is_refused():
    with pytest.raises(InputError, match="unknown architecture 'qwen4'; published are qwen2_5_vl_3b"):
        published.config("qwen4")


def test_a_directory_without_config_names_what_belongs_there(tmp_path):
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json does not exist: config\.checkpoint must name"):
        from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b'{"model_type": "qwen3', b"\xff\xfe", b""], ids=["cut off", "not text", "empty"])
def test_a_broken_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json is not valid JSON .*copy the file again"):
        from_directory(tmp_path)


def test_another_architecture_names_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed(model_type="llava")), encoding="utf-8")
    with pytest.raises(UnsupportedCheckpoint, match=rf"{tmp_path}/config\.json: model_type 'llava'"):
        from_directory(tmp_path)
