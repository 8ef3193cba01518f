"""Prompts, patches and index arrays, against transformers' own code and by hand."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from capcur_jax.errors import InputError
from capcur_jax.models import config as config_lib
from capcur_jax.models import inputs
from capcur_jax.models.inputs import BadInput, Processor
from capcur_jax.models.vision import pixel_values
from tests.packed import padded

SIZES = [(37, 50), (64, 20), (16, 16), (9, 130), (200, 151)]  # the last is above the checkpoint's max_pixels


@pytest.fixture(scope="module")
def pictures(make_image):
    return [make_image(*size, seed=seed) for seed, size in enumerate(SIZES)]


# --- images -----------------------------------------------------------------------------------------------------------


def values_of(prompt, processor) -> np.ndarray:
    return np.asarray(pixel_values(prompt.patches, processor.config.vision))


@pytest.mark.parametrize("kind", ["checkpoint", "windowed_checkpoint"])
def test_patches_equal_transformers_pil_processor(kind, request, pictures):
    """Called by itself, with the settings of preprocessor_config.json and one image at a time."""
    checkpoint = request.getfixturevalue(kind)
    processor = Processor.from_directory(checkpoint)
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    kept = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "size")
    limits = ("min_pixels", "max_pixels")
    theirs = Qwen2VLImageProcessorPil(**{key: settings[key] for key in (*kept, *limits) if key in settings})
    prompt = processor.prepare(processor.render([None] * len(pictures)), pictures)
    done = [theirs(images=[picture], return_tensors="np") for picture in pictures]
    assert prompt.grids == tuple(tuple(one["image_grid_thw"][0].tolist()) for one in done)
    expected, found = np.concatenate([one["pixel_values"] for one in done]), values_of(prompt, processor)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=3e-7)  # of values up to 2.2: a rounding or two
    assert prompt.patches.dtype == np.uint8 and found.dtype == np.float32
    assert found.min() < -0.5 < 0.5 < found.max()


def test_a_patch_holds_its_pixels(processor):
    """Channel, frame, row, column inside a patch; four neighbours that merge follow one another; frames are equal."""
    size = 16  # no resizing: 16 x 16 is within bounds and divisible
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    prompt = processor.prepare(processor.render([None]), [Image.fromarray(pixels)])
    assert prompt.grids == ((1, 4, 4),)
    corners = [(0, 0), (0, 4), (4, 0), (4, 4), (0, 8), (0, 12), (4, 8), (4, 12)]  # the two upper merged blocks
    for patch, (y, x) in zip(prompt.patches, corners, strict=False):
        np.testing.assert_array_equal(patch.reshape(3, 4, 4), np.moveaxis(pixels[y : y + 4, x : x + 4], -1, 0))
    scaled = (np.moveaxis(pixels[:4, :4], -1, 0) / 255.0 - 0.5) / 0.5
    values = values_of(prompt, processor)[0].reshape(3, 2, 4, 4)
    np.testing.assert_allclose(values, np.stack([scaled] * 2, axis=1), atol=1e-6)


@pytest.mark.parametrize("kind", ["checkpoint", "windowed_checkpoint"])
def test_pixels_are_where_they_were(kind, request, make_image):
    """Also of a batch, where a windowed tower has its patches in another order and padding behind them."""
    processor = Processor.from_directory(request.getfixturevalue(kind))
    picture, config = np.asarray(make_image(40, 24)), processor.config
    prompt = processor.prepare(processor.render([None]), [picture])
    places = inputs.coordinates(prompt.grids[0], config.vision)
    np.testing.assert_array_equal(inputs.pixels(prompt.patches, places, config.vision), picture)
    vision = padded([prompt], processor, 128, (1, 64)).vision
    there = vision.segments[0] > 0
    found = inputs.pixels(vision.patches[0][there], vision.coordinates[0][there], config.vision)
    np.testing.assert_array_equal(found, picture)
    assert not (kind.startswith("windowed") and (vision.coordinates[0][there] == places).all())


def test_images_of_other_modes_become_rgb(processor, pictures):
    text = processor.render([None])
    for mode in ("L", "P", "RGBA"):
        other = pictures[0].convert(mode)
        np.testing.assert_array_equal(
            processor.prepare(text, [other]).patches, processor.prepare(text, [other.convert("RGB")]).patches
        )


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1024), (4096, 0), (2048, 4096)])
def test_pixel_bounds_are_respected(checkpoint, pictures, low, high):
    bounded = Processor.from_directory(checkpoint, min_pixels=low, max_pixels=high)
    grids = bounded.prepare(bounded.render([None] * len(pictures)), pictures).grids
    for (width, height), (_, rows, columns) in zip(SIZES, grids, strict=True):
        assert (low or 256) <= rows * columns * 4 * 4 <= (high or 16384)
        assert rows % 2 == columns % 2 == 0
        assert (rows > columns) == (height > width) or rows == columns


# --- what the device code indexes with --------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(1, 6, 10), (1, 2, 14), (1, 14, 14), (1, 20, 4), (2, 4, 6), (1, 2, 2)], ids=str)
def test_vision_indices_equal_transformers(processor, grid):
    vision = processor.config.vision
    index, weight = inputs.table_taps(grid, vision)
    coordinates = inputs.coordinates(grid, vision)
    their_index, their_weight = get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), vision.table_side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    np.testing.assert_array_equal(index, their_index.numpy())
    np.testing.assert_allclose(weight, their_weight.numpy(), atol=1e-6)
    np.testing.assert_allclose(weight.sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(coordinates, get_vision_position_ids(torch.tensor([grid]), 2).numpy())


def test_positions_of_the_published_table_equal_transformers(processor):
    """48 x 48 entries, and grids that are larger than the table."""
    import dataclasses

    vision = dataclasses.replace(processor.config.vision, table_size=48 * 48)
    for grid in [(1, 64, 36), (1, 100, 2), (1, 48, 48)]:
        index, weight = inputs.table_taps(grid, vision)
        their_index, their_weight = get_vision_interpolation_indices_and_weights(
            torch.tensor([grid]), 48, mode="bilinear", align_corners=True, spatial_merge_size=2
        )
        np.testing.assert_array_equal(index, their_index.numpy())
        np.testing.assert_allclose(weight, their_weight.numpy(), atol=1e-6)


# --- text -------------------------------------------------------------------------------------------------------------


def test_rendering_with_and_without_a_system_turn(processor):
    plain = processor.render([None, "What shape?"])
    assert plain == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What shape?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.render([None, "What shape?"], system="Be brief.") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + plain
    )
    assert processor.render(["Only text."]) == "<|im_start|>user\nOnly text.<|im_end|>\n<|im_start|>assistant\n"


def test_an_image_token_for_every_merged_patch(processor, pictures):
    text = processor.render(["Red", None, "or", None, "?"])
    prompt = processor.prepare(text, pictures[:2])
    pieces = text.split("<|image_pad|>")
    counts = [rows * columns // 4 for _, rows, columns in prompt.grids]
    expected = pieces[0] + "<|image_pad|>" * counts[0] + pieces[1] + "<|image_pad|>" * counts[1] + pieces[2]
    assert processor.tokenizer.decode(prompt.tokens) == expected
    assert sum(counts) * 4 == len(prompt.patches)
    np.testing.assert_array_equal(prompt.visual_index[prompt.visual_index >= 0], np.arange(sum(counts)))
    np.testing.assert_array_equal(prompt.visual_index >= 0, prompt.tokens == processor.config.image_token)


@pytest.mark.parametrize(
    ("parts", "images", "message"),
    [
        ([None, "How many?"], 0, "1 image placeholders for 0 images"),
        ([None, None, "What is <|image_pad|>?"], 1, "2 image placeholders for 1 images"),
        (["No image here."], 1, "0 image placeholders for 1 images"),
        ([None], 2, "1 image placeholders for 2 images"),
    ],
)
def test_placeholders_that_do_not_match_the_images_are_bad_input(processor, pictures, parts, images, message):
    with pytest.raises(BadInput, match=message + "; give the question one mark an image"):
        processor.prepare(processor.render(parts), pictures[:images])


def test_decoding_drops_special_tokens_and_keeps_thoughts(processor):
    text = "<think>3 x 4</think> boxed{12}"
    tokens = processor.tokenizer(text + "<|im_end|><|endoftext|>")["input_ids"]
    assert processor.decode(np.array(tokens, np.int32)) == text
    assert len(tokens) == len(processor.tokenizer(text)["input_ids"]) + 2


def test_end_and_banned_tokens_are_qwens(processor):
    names = processor.tokenizer.convert_ids_to_tokens
    assert names(list(processor.end_tokens)) == ["<|im_end|>", "<|endoftext|>"]
    assert names(list(processor.banned_tokens)) == [
        "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    ]  # fmt: skip
    assert names([processor.pad_token]) == ["<|endoftext|>"]
    assert processor.config.image_token in processor.banned_tokens


def test_what_a_checkpoint_lacks_is_named(checkpoint, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint / "config.json", bare)
    with pytest.raises(InputError, match=r"bare: preprocessor_config\.json is missing; copy the whole checkpoint"):
        Processor.from_directory(bare)
    shutil.copy(checkpoint / "preprocessor_config.json", bare)
    # transformers alone would go on with an empty tokenizer here.
    with pytest.raises(InputError, match=r"bare: tokenizer\.json is missing; copy the whole checkpoint"):
        Processor.from_directory(bare)
    (bare / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(InputError, match=r"bare: no usable tokenizer .*copy tokenizer\.json too"):
        Processor.from_directory(bare)
    shutil.copy(checkpoint / "tokenizer.json", bare)
    with pytest.raises(InputError, match=r"bare: the tokenizer has no chat template; copy chat_template\.jinja too"):
        Processor.from_directory(bare)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        content = (checkpoint / name).read_text(encoding="utf-8")
        (bare / name).write_text(content.replace("<|im_end|>", "<|a|>").replace("<|endoftext|>", "<|b|>"), "utf-8")
    with pytest.raises(InputError, match="knows none of the end tokens"):
        Processor.from_directory(bare)


def test_a_token_without_a_row_in_the_embedding_is_named(checkpoint, processor, tmp_path):
    """It would read some other token's row, or none."""
    added = shutil.copytree(checkpoint, tmp_path / "added")
    tokens, rows = json.loads((added / "tokenizer.json").read_text("utf-8")), processor.config.text.vocabulary
    token = {key: False for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    tokens["added_tokens"].append({"id": rows, "content": "<mytool>", **token})
    (added / "tokenizer.json").write_text(json.dumps(tokens), "utf-8")
    with pytest.raises(InputError, match=rf"token '<mytool>' has the id \d+, but the embedding has {rows} rows"):
        Processor.from_directory(added)


def test_the_template_of_the_processor_counts_before_the_tokenizer_s(windowed_checkpoint, tmp_path):
    """As published for Qwen2.5-VL: the tokenizer's own template knows of texts alone, chat_template.json of images."""
    published = shutil.copytree(windowed_checkpoint, tmp_path / "published")
    textual = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
    (published / "chat_template.jinja").write_text(textual, encoding="utf-8")
    prompt = Processor.from_directory(published).render([None, "Where?"])
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    sight = "<|vision_start|><|image_pad|><|vision_end|>"
    assert prompt == f"{system}<|im_start|>user\n{sight}Where?<|im_end|>\n<|im_start|>assistant\n"
    (published / "chat_template.jinja").unlink()  # nor does it need one of its own
    known = Processor.from_directory(published)
    assert known.render([None, "Where?"]) == prompt
    assert known.render(["Hello."], system="Be short.").startswith(
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user"
    )
    (published / "chat_template.json").write_text('{"chat": 1}', encoding="utf-8")
    with pytest.raises(InputError, match=r"chat_template\.json holds no chat template; copy the file again"):
        Processor.from_directory(published)


def test_image_settings_of_qwen2_5_vl(windowed_checkpoint, pictures):
    """Bounds as min_pixels and max_pixels, CLIP's mean and deviation: as transformers' own processor reads the file."""
    settings = json.loads((windowed_checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert settings["image_mean"] == [0.48145466, 0.4578275, 0.40821073] and "size" not in settings
    known = Processor.from_directory(windowed_checkpoint)
    assert dict(known.images.size) == {"shortest_edge": 256, "longest_edge": 16384}
    theirs = Qwen2VLImageProcessorPil.from_pretrained(str(windowed_checkpoint))
    prompt = known.prepare(known.render([None] * len(pictures)), pictures)
    done = theirs(images=pictures, return_tensors="np")
    np.testing.assert_allclose(values_of(prompt, known), done["pixel_values"], rtol=3e-7, atol=3e-7)
    pixel = Image.new("RGB", (16, 16), (255, 255, 255))
    white = values_of(known.prepare(known.render([None]), [pixel]), known).reshape(-1, 3, 2, 4, 4)
    np.testing.assert_allclose(white[:, 0], (1 - 0.48145466) / 0.26862954, rtol=1e-5)


def test_image_settings_in_processor_config(checkpoint, pictures, tmp_path):
    """Newer writers nest them there and leave preprocessor_config.json out."""
    newer = shutil.copytree(checkpoint, tmp_path / "newer")
    settings = json.loads((newer / "preprocessor_config.json").read_text(encoding="utf-8"))
    (newer / "preprocessor_config.json").unlink()
    nested = {"processor_class": "Qwen3VLProcessor", "image_processor": settings}
    (newer / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")
    ours, same = Processor.from_directory(checkpoint), Processor.from_directory(newer)
    text = ours.render([None])
    np.testing.assert_array_equal(ours.prepare(text, pictures[:1]).patches, same.prepare(text, pictures[:1]).patches)
    # They count before those of the older file, as for transformers.
    nested["image_processor"] = settings | {"image_mean": [0.1, 0.2, 0.3], "rescale_factor": 1 / 128}
    (newer / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")
    (newer / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    vision = Processor.from_directory(newer).config.vision
    assert (vision.mean, vision.rescale) == ((0.1, 0.2, 0.3), 1 / 128)


@pytest.mark.parametrize("changes", [
    {"image_mean": None, "image_std": None}, {"do_rescale": False, "do_normalize": False}, {"rescale_factor": 0.01},
    {"image_mean": 0.4, "image_std": 0.25},
], ids=str)  # fmt: skip
def test_what_a_byte_counts_is_as_transformers_reads_the_file(checkpoint, pictures, tmp_path, changes):
    """None: the file does not say."""
    other = shutil.copytree(checkpoint, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text(encoding="utf-8")) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    (other / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    known = Processor.from_directory(other)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(str(other))(images=pictures[:2], return_tensors="np")
    found = values_of(known.prepare(known.render([None] * 2), pictures[:2]), known)
    np.testing.assert_allclose(found, theirs["pixel_values"], rtol=3e-7, atol=3e-7)
    assert config_lib.from_directory(other) == known.config


def test_a_video_is_refused_by_name(processor):
    with pytest.raises(BadInput, match="video placeholder; videos are not supported"):
        processor.prepare("<|vision_start|><|video_pad|><|vision_end|> What happens?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"patch_size": ', r"preprocessor_config\.json is not usable .*copy it again"),
        ("{}", r"patch_size is 14 by preprocessor_config\.json and 4 by config\.json; copy the whole checkpoint"),
    ],
)
def test_image_settings_that_do_not_fit_are_named(checkpoint, tmp_path, content, message):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "preprocessor_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="broken: " + message):
        Processor.from_directory(broken)
