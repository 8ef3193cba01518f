"""Prompts packed into batches of declared shape: the smallest that holds them, every image whole and in its place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies

from capcur_jax.errors import InputError
from capcur_jax.models import config as config_lib
from capcur_jax.models import inputs
from capcur_jax.models.batching import (
    BatchShape,
    Buckets,
    PromptSize,
    assign_rows,
    padding,
    place_images,
    rows_of,
    smallest_bucket,
)
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


def test_large_images_are_placed_first_and_small_ones_fill_the_fullest_row():
    assert assign_rows([10, 60, 36, 24, 4], 64) == [(2, 0), (0, 0), (1, 0), (1, 36), (0, 60)]
    assert assign_rows([64, 64], 64) == [(0, 0), (1, 0)]
    assert assign_rows([], 64) == []
    with pytest.raises(InputError, match=r"config\.prompt\.patch_row = 64 does not hold an image of 65 patches"):
        assign_rows([65], 64)


@given(strategies.lists(strategies.integers(1, 64).map(lambda features: 4 * features), max_size=60))
def test_rows_hold_what_they_can_and_no_two_images_share_a_slot(sizes):
    taken = np.zeros((len(sizes), 256), int)
    places = assign_rows(sizes, 256)
    for (row, at), size in zip(places, sizes, strict=True):
        taken[row, at : at + size] += 1
        assert at % 4 == 0 and at + size <= 256
    filled = taken.sum(1)
    assert taken.max(initial=0) <= 1 and filled.sum() == sum(sizes)
    # A row is begun for an image that no row before it has room for.
    begins = [(row, size) for (row, at), size in zip(places, sizes, strict=True) if at == 0]
    assert all(filled[:row].min(initial=256) + size > 256 for row, size in begins)
    assert sorted(row for row, _ in begins) == list(range(np.count_nonzero(filled)))


def test_the_shape_of_a_batch():
    buckets = Buckets((16, 32), patch_row=64, patch_rows=(0.5, 1.0))
    images = [PromptSize(10), PromptSize(20, (12,)), PromptSize(15, (40, 8)), PromptSize(1)]
    assert buckets.shape(images) == BatchShape(4, 32, 2)
    assert buckets.shape([PromptSize(9, (40, 40))] * 2 + [PromptSize(9)] * 2) == BatchShape(4, 16, 4)
    assert buckets.shape([PromptSize(16)]) == BatchShape(1, 16, 0)  # no image: no vision arrays
    # Where images may come, a batch without any takes the program of one with few.
    assert buckets.shape([PromptSize(16)] * 4, images=True) == BatchShape(4, 16, 2)
    with pytest.raises(InputError, match=r"config\.prompt\.token_buckets .* 33"):
        buckets.shape([PromptSize(33)])
    with pytest.raises(InputError, match=r"config\.prompt\.patch_row = 64 .* 68"):
        buckets.shape([PromptSize(3, (68,))])
    with pytest.raises(InputError, match=r"config\.prompt\.patch_rows = .* gives 1 prompts at most 1 .* need 2"):
        buckets.shape([PromptSize(3, (40, 40))])


def test_a_batch_holds_every_prompt_and_blank_padding(processor, prompts):
    buckets, config = Buckets((128, 512), patch_row=256, patch_rows=(0.6, 1.0)), processor.config
    batch = buckets.collate(prompts, config, processor.pad_token)
    assert batch.tokens.shape == (3, 128)
    assert batch.vision.patches.shape[:2] == (2, 256)
    blank = buckets.blank(BatchShape(3, 128, 2), config, processor.pad_token)
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
            at += len(own)
    nowhere = batch.vision.segments == 0
    np.testing.assert_array_equal(taken.reshape(2, 256), ~nowhere)
    for name in ("patches", "table_weight", "coordinates", "windows"):
        if getattr(blank.vision, name) is not None:
            np.testing.assert_array_equal(getattr(batch.vision, name)[nowhere], getattr(blank.vision, name)[nowhere])
    assert buckets.collate(prompts[1:2], config, processor.pad_token).vision is None
    shares = padding([batch, buckets.collate(prompts[1:2], config, processor.pad_token)])
    tokens, patches = sum(map(len, prompts)) + len(prompts[1]), sum(len(prompt.patches) for prompt in prompts)
    assert shares == pytest.approx({"token_padding": 1 - tokens / 512, "patch_padding": 1 - patches / 512})


# ---------------------------------------------------------------------- parts of a batch


def test_the_shape_of_parts_is_that_of_the_one_with_most_images():
    buckets = Buckets((16, 32), patch_row=64, patch_rows=(0.5, 1.0, 2.0))
    sizes = [PromptSize(10, (64,)), PromptSize(20, (40,)), PromptSize(15), PromptSize(1)]
    assert buckets.shape(sizes) == BatchShape(4, 32, 2)
    assert buckets.shape(sizes, shards=2) == BatchShape(4, 32, 2 * 2)  # of a part's 1, 2 and 4
    assert buckets.shape(sizes, shards=4) == BatchShape(4, 32, 4 * 1)
    # The same images side by side need fewer: each part has two prompts and one row.
    assert buckets.shape([sizes[0], sizes[2], sizes[1], sizes[3]], shards=2) == BatchShape(4, 32, 2 * 1)
    with pytest.raises(InputError, match=r"config\.prompt\.patch_rows = .* gives 1 prompts at most 2 .* need 3"):
        buckets.shape([PromptSize(3, (64, 64, 64)), PromptSize(3)], shards=2)


def test_images_of_a_prompt_lie_in_its_own_part(processor, prompts):
    """Each part is what its prompts would be alone; a feature's number counts within the part."""
    order = [0, 1, 2, 1]
    given = [prompts[n] for n in order]
    buckets, config, pad = Buckets((128,), patch_row=256, patch_rows=(0.5, 1.0)), processor.config, processor.pad_token
    for shards in (2, 4):
        each, batch = 4 // shards, buckets.collate(given, config, pad, shards=shards)
        rows = len(batch.vision.patches) // shards
        for shard in range(shards):
            here, there = slice(shard * each, (shard + 1) * each), slice(shard * rows, (shard + 1) * rows)
            part = buckets.collate(given[here], config, pad, shape=BatchShape(each, 128, rows))
            for name in ("tokens", "lengths", "positions", "next_position", "visual_index"):
                np.testing.assert_array_equal(getattr(batch, name)[here], getattr(part, name), name)
            for name in ("patches", "table_index", "table_weight", "coordinates", "segments", "windows"):
                if getattr(batch.vision, name) is not None:
                    np.testing.assert_array_equal(getattr(batch.vision, name)[there], getattr(part.vision, name), name)
        features = batch.vision.patches.reshape(shards, rows * 256, -1)
        for row, prompt in enumerate(given):
            index = batch.visual_index[row][batch.visual_index[row] >= 0]
            where = (index[:, None] * 4 + np.arange(4)).reshape(-1)
            np.testing.assert_array_equal(features[row // each][where], prompt.patches)


def test_rows_without_a_prompt_repeat_the_last_of_their_part(processor, prompts):
    """Where a part gets nothing of its own, that is the last prompt of all."""
    buckets, config, pad = Buckets((128,), patch_row=256, patch_rows=(1.0,)), processor.config, processor.pad_token
    batch = buckets.collate(prompts[:1], config, pad, rows=4, shards=2)
    for name in ("tokens", "lengths", "positions", "visual_index"):
        for row in range(1, 4):
            np.testing.assert_array_equal(getattr(batch, name)[row], getattr(batch, name)[0])
    rows = len(batch.vision.segments) // 2
    for part in (batch.vision.segments[:rows], batch.vision.segments[rows:]):
        assert (part > 0).sum() == len(prompts[0].patches)  # once in each part, not once a row


def test_no_prompt_at_all_makes_a_blank_of_the_agreed_shape(processor):
    buckets = Buckets((128,), patch_row=256, patch_rows=(1.0,))
    batch = buckets.collate([], processor.config, processor.pad_token, shape=BatchShape(4, 128, 4), shards=2)
    assert batch.tokens.shape == (4, 128) and (batch.vision.segments == 0).all() and (batch.visual_index == -1).all()


@pytest.mark.parametrize(("rows", "shards"), [(1, 1), (4, 1), (8, 2), (8, 4), (6, 2)])
def test_every_batch_that_can_be_drawn_has_a_declared_shape(rows, shards):
    random = np.random.default_rng(rows + shards)
    buckets = Buckets((16, 32, 48), patch_row=64, patch_rows=(0.25, 0.5, 1.0, 2.0, 3.0))
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
    buckets = Buckets((16,), patch_row=64, patch_rows=(0.5, 0.75, 1.0))
    sizes = [PromptSize(9, (16, 16, 12))] * 4 + [PromptSize(9, (36,))] * 4
    assert buckets.shape(sizes[:4]).patch_rows == 3 and buckets.shape(sizes[4:]).patch_rows == 4
    assert {shape.patch_rows for shape in buckets.shapes(sizes, True, 4)} == {2, 3, 4}


def test_what_no_batch_can_need_is_not_declared():
    buckets = Buckets((16, 32, 48), patch_row=64, patch_rows=(0.25, 0.5, 1.0))
    assert buckets.shapes([PromptSize(20, (4,))] * 9, True, 8) == [BatchShape(8, 32, 2)]
    # Two images of half a row share one.
    assert Buckets((16,), 64, (0.5,)).shapes([PromptSize(9, (32,))] * 8, True, 8) == [BatchShape(8, 16, 4)]
    assert buckets.shapes([PromptSize(9), PromptSize(40)], False, 8) == [BatchShape(8, 16, 0), BatchShape(8, 48, 0)]
    with pytest.raises(InputError, match=r"config\.prompt\.patch_rows .* at most 8 .* need 16"):
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
    shares = draw(strategies.lists(strategies.sampled_from((0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)), min_size=1))
    each, shards = draw(strategies.integers(1, 8)), draw(strategies.integers(1, 3))
    drawn = draw(strategies.lists(strategies.sampled_from(sizes), min_size=1, max_size=each * shards))
    return Buckets((16,), length, tuple(shares)), each * shards, shards, sizes, drawn


@given(_stages())
def test_a_batch_of_sizes_that_passed_the_warm_up_fits_a_shape_that_it_compiled(stage):
    buckets, rows, shards, sizes, drawn = stage
    try:
        declared = buckets.shapes(sizes, True, rows, shards)
    except InputError:
        return  # said before the first step
    assert buckets.shape(drawn, True, rows, shards) in declared


def test_images_of_several_prompts_need_no_more_rows_than_the_prompts_alone():
    """Together 5 4 3 3 3 2 take three rows of ten, each largest first in the fullest row that holds it."""
    buckets = Buckets((512,), 10, (0.5, 1.0))
    sizes = [PromptSize(100, (10,)), PromptSize(100, (5, 3, 2)), PromptSize(100, (4, 3, 3))]
    assert buckets.shapes(sizes, True, 2) == [BatchShape(2, 512, 1), BatchShape(2, 512, 2)]
    assert buckets.shape(sizes[1:], True, 2) == BatchShape(2, 512, 2)
    places = place_images([size.images for size in sizes[1:]], 10)
    assert [row for row, _ in places] == [0, 0, 0, 1, 1, 1] and rows_of(places) == 2
    assert rows_of(assign_rows([5, 3, 2, 4, 3, 3], 10)) == 3


def test_a_batch_that_would_fail_in_a_step_fails_before_the_first_one():
    """The prompts with most patches fit three rows; four with 70 each need four."""
    sizes = [PromptSize(100, (50, 25))] * 4 + [PromptSize(100, (70,))] * 4
    with pytest.raises(InputError, match=r"gives 4 prompts at most 3 rows .* can need 4: declare 1 too"):
        Buckets((512,), 100, (0.75,)).shapes(sizes, True, 4)
    assert Buckets((512,), 100, (0.75, 1.0)).shape(sizes[4:], True, 4) == BatchShape(4, 512, 4)
