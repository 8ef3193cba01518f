"""Prompts packed into batches of declared shape: the smallest that holds them, every image whole and in its place."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, strategies

from capcur_jax.errors import InputError
from capcur_jax.models import config as config_lib
from capcur_jax.models import inputs
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize, padding, smallest_bucket
from capcur_jax.models.inputs import Processor


@pytest.fixture(scope="module", params=["checkpoint", "windowed_checkpoint"])
def processor(request):
    return Processor.from_directory(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def prompts(processor, make_image):
    pictures = [make_image(*size, seed=i) for i, size in enumerate([(40, 56), (24, 16), (64, 48)])]
    return [
        processor.prepare(processor.render([None, "or", None]), pictures[:2]),
        processor.prepare(processor.render(["What is 3 x 4?"])),
        processor.prepare(processor.render(["boxed{}", None]), pictures[2:]),
    ]


@pytest.mark.parametrize(("needed", "bucket"), [(0, 24), (1, 24), (24, 24), (25, 32), (33, 48), (48, 48)])
def test_the_smallest_bucket_that_fits_in_whatever_order(needed, bucket):
    assert smallest_bucket((24, 32, 48), needed, "key") == smallest_bucket((48, 24, 32), needed, "key") == bucket


def test_no_bucket_is_an_error_that_names_the_key_and_the_need():
    with pytest.raises(InputError, match=r"config\.x\.buckets = \(24, 48\) has no bucket for 49; declare a larger"):
        smallest_bucket((24, 48), 49, "config.x.buckets")


def test_the_shape_of_a_batch():
    buckets = Buckets((16, 32), ((1, 64), (2, 64), (4, 64)))
    images = [PromptSize(10), PromptSize(20, (12,)), PromptSize(15, (40, 8)), PromptSize(1)]
    assert buckets.shape(images) == BatchShape(4, 32, 1, 64)
    assert buckets.shape([PromptSize(9, (40, 40))] * 2 + [PromptSize(9)] * 2) == BatchShape(4, 16, 4, 64)
    assert buckets.shape([PromptSize(16)]) == BatchShape(1, 16)  # no image: no vision arrays
    # Where images may come, a batch without any takes the program of one with few.
    assert buckets.shape([PromptSize(16)] * 4, images=True) == BatchShape(4, 16, 1, 64)
    with pytest.raises(InputError, match=r"config\.prompt\.token_buckets .* 33"):
        buckets.shape([PromptSize(33)])
    with pytest.raises(InputError, match=r"image of 132 patches is longer .* has 64: .* config\.prompt\.patch_buckets"):
        buckets.shape([PromptSize(3, (132,))])
    with pytest.raises(InputError, match=r"config\.prompt\.patch_buckets = .* of 1 prompts .* declare \(5, 64\)"):
        buckets.shape([PromptSize(3, (40,) * 5)])


def test_declared_shapes_of_a_config(processor):
    merge, patch = processor.config.vision.merge_size**2, processor.config.vision.patch_size
    settings = {"token_buckets": (16,), "patch_buckets": ((1, 64),), "min_pixels": 0}
    assert Buckets.of(settings, processor.config.vision) == Buckets((16,), ((1, 64),), merge)
    assert Buckets.of(settings, processor.config.vision, 9 * merge * patch**2).smallest == 9 * merge
    larger = settings | {"min_pixels": 2 * merge * patch**2}
    assert Buckets.of(larger, processor.config.vision, 9 * merge * patch**2).smallest == 2 * merge
    with pytest.raises(InputError, match=rf"config\.prompt\.patch_buckets = .* multiple of {merge}"):
        Buckets.of(settings | {"patch_buckets": ((1, 65),)}, processor.config.vision)


def test_a_batch_holds_every_prompt_and_blank_padding(processor, prompts):
    buckets, config = Buckets((128, 512), ((2, 256), (3, 256))), processor.config
    batch = buckets.collate(prompts, config, processor.pad_token)
    assert batch.tokens.shape == (3, 128)
    assert batch.vision.patches.shape[:2] == (2, 256)
    blank = buckets.blank(BatchShape(3, 128, 2, 256), config, processor.pad_token)
    flat, taken = batch.vision.patches.reshape(2 * 256, -1), np.zeros(2 * 256, int)
    for row, prompt in enumerate(prompts):
        length = len(prompt)
        assert batch.lengths[row] == length
        np.testing.assert_array_equal(batch.tokens[row, :length], prompt.tokens)
        assert (batch.tokens[row, length:] == processor.pad_token).all()
        shown = batch.visual_index[row] >= 0
        assert (shown[:length] == (prompt.tokens == config.image_token)).all() and not shown[length:].any()
        # An image token's feature is merged from the four patches that its place in the image says.
        where = (batch.visual_index[row][shown][:, None] * 4 + np.arange(4)).reshape(-1)
        np.testing.assert_array_equal(flat[where], prompt.patches)
        expected = [inputs.coordinates(grid, config.vision) for grid in prompt.grids]
        found = batch.vision.coordinates.reshape(-1, 2)[where]
        np.testing.assert_array_equal(found, np.concatenate([np.zeros((0, 2), int), *expected]))
        taken[where] += 1
        # Each image is a segment of its own.
        at = 0
        for grid in prompt.grids:
            own = where[at : at + np.prod(grid)]
            segments = batch.vision.segments.reshape(-1)[own]
            assert len(set(segments.tolist())) == 1 and segments[0] > 0
            assert (batch.vision.segments[own[0] // 256] == segments[0]).sum() == len(own)
            at_row, number = own[0] // 256, segments[0] - 1
            assert batch.vision.starts[at_row, number] == own.min() % 256
            assert batch.vision.lengths[at_row, number] == len(own)
            at += len(own)
    assert (batch.vision.lengths > 0).sum() == sum(len(prompt.grids) for prompt in prompts)
    nowhere = batch.vision.segments == 0
    np.testing.assert_array_equal(taken.reshape(2, 256), ~nowhere)
    for name in ("patches", "table_weight", "coordinates", "windows"):
        if getattr(blank.vision, name) is not None:
            np.testing.assert_array_equal(getattr(batch.vision, name)[nowhere], getattr(blank.vision, name)[nowhere])
    assert buckets.collate(prompts[1:2], config, processor.pad_token).vision is None
    shares = padding([batch, buckets.collate(prompts[1:2], config, processor.pad_token)])
    tokens, patches = sum(map(len, prompts)) + len(prompts[1]), sum(len(prompt.patches) for prompt in prompts)
    assert shares == pytest.approx({"token_padding": 1 - tokens / 512, "patch_padding": 1 - patches / 512})


# ---------------------------------------------------------------------- shapes that follow from prompts


def test_declared_shapes_hold_what_is_asked(processor):
    vision, declared = processor.config.vision, Buckets((48, 96), ((4, 64),))
    held = declared.holding([PromptSize(40, (64,)), PromptSize(96)], 4, vision, "float32")
    # No table is longer than these images need.
    assert held == dataclasses.replace(declared, smallest=64, most=4)
    assert declared.holding([PromptSize(96)], 4, vision, "float32") == declared
    wider = declared.holding([PromptSize(40, (64,)), PromptSize(96)], 5, vision, "float32")
    assert wider.patches == ((3, 64), (5, 64))
    sizes = [PromptSize(40, (64,)), PromptSize(300, (100, 100, 30))]
    larger = declared.holding(sizes, 4, vision, "float32")
    assert max(larger.tokens) >= 300 and larger.images.longest >= 100 and larger.most == 4 * 3
    assert larger.images.possible([size.images for size in sizes], 4) == list(larger.patches)
    single = Buckets((512,), ((1, 64), (1, 256))).holding(sizes, 4, vision, "float32")
    assert single.patches == ((1, 64), (1, 256), (1, 512), (1, 1024))
    assert single.images.possible([size.images for size in sizes], 4) == list(single.patches)
    assert Buckets(()).holding([PromptSize(40)], 4, vision, "float32") == Buckets((128,))


@pytest.mark.parametrize(
    ("platform", "dtype", "attention", "patches"),
    [
        ("cpu", "bfloat16", "auto", ((8, 512), (16, 512))),
        ("tpu", "bfloat16", "auto", ((1, 3200), (1, 6400))),
        ("tpu", "float32", "auto", ((8, 512), (16, 512))),
        ("tpu", "bfloat16", "xla", ((8, 512), (16, 512))),
    ],
)
def test_images_share_one_row_where_a_kernel_skips_the_others_and_else_have_rows_of_their_length(
    processor, monkeypatch, platform, dtype, attention, patches
):
    """XLA's scores of one row with 16 such images would be ten times as many as those of 16 rows."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    sizes = [PromptSize(500, (400,) * 4), PromptSize(30)]
    assert Buckets(()).holding(sizes, 4, processor.config.vision, dtype, attention).patches == patches


# ---------------------------------------------------------------------- parts of a batch


def test_the_shape_of_parts_is_that_of_the_one_with_most_images():
    buckets = Buckets((16, 32), ((1, 64), (2, 64)))
    sizes = [PromptSize(10, (64,)), PromptSize(20, (40,)), PromptSize(15), PromptSize(1)]
    assert buckets.shape(sizes) == BatchShape(4, 32, 2, 64)
    assert buckets.shape(sizes, shards=2) == BatchShape(4, 32, 2 * 2, 64)
    assert buckets.shape(sizes, shards=4) == BatchShape(4, 32, 4 * 1, 64)
    # The same images side by side need fewer: each part has two prompts and one row.
    assert buckets.shape([sizes[0], sizes[2], sizes[1], sizes[3]], shards=2) == BatchShape(4, 32, 2 * 1, 64)
    with pytest.raises(InputError, match=r"config\.prompt\.patch_buckets = .* of 1 prompts .* declare \(3, 64\)"):
        buckets.shape([PromptSize(3, (64, 64, 64)), PromptSize(3)], shards=2)


def test_images_of_a_prompt_lie_in_its_own_part(processor, prompts):
    """Each part is what its prompts would be alone; a feature's number counts within the part."""
    order = [0, 1, 2, 1]
    given = [prompts[n] for n in order]
    buckets, config, pad = Buckets((128,), ((1, 256), (2, 256))), processor.config, processor.pad_token
    for shards in (2, 4):
        each, batch = 4 // shards, buckets.collate(given, config, pad, shards=shards)
        rows = len(batch.vision.patches) // shards
        for shard in range(shards):
            here, there = slice(shard * each, (shard + 1) * each), slice(shard * rows, (shard + 1) * rows)
            part = buckets.collate(given[here], config, pad, shape=BatchShape(each, 128, rows, 256))
            for name in ("tokens", "lengths", "positions", "next_position", "visual_index"):
                np.testing.assert_array_equal(getattr(batch, name)[here], getattr(part, name), name)
            for name in (
                "patches",
                "table_index",
                "table_weight",
                "coordinates",
                "segments",
                "starts",
                "lengths",
                "windows",
            ):
                if getattr(batch.vision, name) is not None:
                    np.testing.assert_array_equal(getattr(batch.vision, name)[there], getattr(part.vision, name), name)
        features = batch.vision.patches.reshape(shards, rows * 256, -1)
        for row, prompt in enumerate(given):
            index = batch.visual_index[row][batch.visual_index[row] >= 0]
            where = (index[:, None] * 4 + np.arange(4)).reshape(-1)
            np.testing.assert_array_equal(features[row // each][where], prompt.patches)


def test_rows_without_a_prompt_repeat_the_last_of_their_part(processor, prompts):
    """Where a part gets nothing of its own, that is the last prompt of all."""
    buckets, config, pad = Buckets((128,), ((2, 256),)), processor.config, processor.pad_token
    batch = buckets.collate(prompts[:1], config, pad, rows=4, shards=2)
    for name in ("tokens", "lengths", "positions", "visual_index"):
        for row in range(1, 4):
            np.testing.assert_array_equal(getattr(batch, name)[row], getattr(batch, name)[0])
    rows = len(batch.vision.segments) // 2
    for part in (batch.vision.segments[:rows], batch.vision.segments[rows:]):
        assert (part > 0).sum() == len(prompts[0].patches)  # once in each part, not once a row


def test_no_prompt_at_all_makes_a_blank_of_the_agreed_shape(processor):
    buckets = Buckets((128,), ((2, 256),))
    batch = buckets.collate([], processor.config, processor.pad_token, shape=BatchShape(4, 128, 4, 256), shards=2)
    assert batch.tokens.shape == (4, 128) and (batch.vision.segments == 0).all() and (batch.visual_index == -1).all()


@pytest.mark.parametrize(("rows", "shards"), [(1, 1), (4, 1), (8, 2), (8, 4), (6, 2)])
def test_every_batch_that_can_be_drawn_has_a_declared_shape(rows, shards):
    random = np.random.default_rng(rows + shards)
    declared = [tuple((n, 64) for n in (1, 2, 4, 8, 12, 24)), tuple((1, 64 * n) for n in (1, 2, 4, 8, 12, 24))]
    buckets = Buckets((16, 32, 48), declared[rows % 3 == 0])
    for number in range(12):
        images = number % 4 > 0
        # Few sizes or many, small images or large: the sum of patches alone does not say how well they pack.
        sizes = [
            PromptSize(
                int(random.integers(1, 40)),
                tuple((4 * random.integers(1, 5 + number, random.integers(0, 4))).tolist()) if images else (),
            )
            for _ in range(random.choice([2, 5, 40]))
        ]
        declared = buckets.shapes(sizes, images, rows, shards)
        assert len(set(declared)) == len(declared)
        for _ in range(60):
            # Prompts may come twice in a batch, as they do where an epoch ends.
            drawn = [sizes[n] for n in random.integers(0, len(sizes), rows)]
            assert buckets.shape(drawn, images, rows, shards) in declared
        for size in sizes:
            assert buckets.shape([size] * rows, images, rows, shards) in declared


def test_an_image_over_half_a_row_packs_worse_than_its_size_says():
    """Four of 36 patches need a row each; four prompts of 44 in small images share three."""
    buckets = Buckets((16,), ((2, 64), (3, 64), (4, 64)))
    sizes = [PromptSize(9, (16, 16, 12))] * 4 + [PromptSize(9, (36,))] * 4
    assert buckets.shape(sizes[:4]).patch_rows == 3 and buckets.shape(sizes[4:]).patch_rows == 4
    assert {shape.patch_rows for shape in buckets.shapes(sizes, True, 4)} == {2, 3, 4}


def test_what_no_batch_can_need_is_not_declared():
    buckets = Buckets((16, 32, 48), ((2, 64), (4, 64), (8, 64)))
    assert buckets.shapes([PromptSize(20, (4,))] * 9, True, 8) == [BatchShape(8, 32, 2, 64)]
    # Two images of half a row share one.
    assert Buckets((16,), ((4, 64),)).shapes([PromptSize(9, (32,))] * 8, True, 8) == [BatchShape(8, 16, 4, 64)]
    assert buckets.shapes([PromptSize(9), PromptSize(40)], False, 8) == [BatchShape(8, 16), BatchShape(8, 48)]
    # The prompts with images are longer than 16 tokens.
    assert buckets.shapes([PromptSize(9), PromptSize(20, (64,))], True, 4) == [
        BatchShape(4, 16, 2, 64), BatchShape(4, 32, 2, 64), BatchShape(4, 32, 4, 64),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"config\.prompt\.patch_buckets .* of 8 prompts .* declare \(16, 64\)"):
        buckets.shapes([PromptSize(9, (64, 64))] * 8, True, 8)


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 8, 8), (1, 10, 14), (2, 6, 10), (1, 2, 18)])
def test_window_order_equals_transformers(windowed_checkpoint, grid):
    import torch
    from transformers.vision_utils import get_vision_window_index

    vision = config_lib.from_directory(windowed_checkpoint).vision
    order, windows = inputs.window_order(grid, vision)
    theirs, boundaries = get_vision_window_index(
        torch.tensor([grid]), spatial_merge_size=2, window_size=16, patch_size=4
    )
    np.testing.assert_array_equal(order, theirs.numpy())
    lengths = np.diff(boundaries.numpy()) // 4
    np.testing.assert_array_equal(windows, np.repeat(np.arange(len(lengths)), lengths))


@strategies.composite
def _stages(draw):
    """Buckets, prompts of a batch, its parts, the sizes of a stage, and a batch drawn from them."""
    length = draw(strategies.integers(1, 30))
    images = strategies.lists(strategies.integers(1, length), max_size=4).map(tuple)
    sizes = draw(strategies.lists(images.map(lambda patches: PromptSize(9, patches)), min_size=1, max_size=6))
    rows = sorted(draw(strategies.lists(strategies.integers(1, 20), min_size=1, max_size=6)))
    row, single = draw(strategies.integers(max(1, length // 2), 2 * length)), draw(strategies.booleans())
    declared = tuple((1, row * n) if single else (n, row) for n in rows)
    each, shards = draw(strategies.integers(1, 8)), draw(strategies.integers(1, 3))
    drawn = draw(strategies.lists(strategies.sampled_from(sizes), min_size=1, max_size=each * shards))
    buckets = Buckets((16,), declared, draw(strategies.integers(1, 4)))
    return buckets, each * shards, shards, sizes, drawn


@given(_stages())
def test_a_batch_of_sizes_that_passed_the_warm_up_fits_a_shape_that_it_compiled(stage):
    buckets, rows, shards, sizes, drawn = stage
    try:
        declared = buckets.shapes(sizes, True, rows, shards)
    except InputError:
        return  # said before the first step
    assert buckets.shape(drawn, True, rows, shards) in declared
