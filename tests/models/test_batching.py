"""Prompts in packed rows of declared shape: the smallest that holds them, every image whole and in its place."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from hypothesis import given, strategies

from capcur_jax.errors import InputError
from capcur_jax.models import config as config_lib
from capcur_jax.models import inputs
from capcur_jax.models.batching import Buckets, PromptSize, smallest_bucket
from capcur_jax.models.image_rows import place_images, rows_of
from capcur_jax.models.inputs import Processor
from capcur_jax.models.packed_rows import Bounds, RowShape


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


def test_a_row_is_as_long_as_its_prompts_together():
    buckets = Buckets((16, 32, 48), ((1, 64), (2, 64), (4, 64)))
    assert buckets.shape([[PromptSize(16)]]) == RowShape(16)  # no image: no vision arrays
    assert buckets.shape([[PromptSize(16), PromptSize(1)]]) == RowShape(32)
    assert buckets.shape([[PromptSize(10), PromptSize(20, (12,)), PromptSize(15, (40, 8))]]) == RowShape(48, 1, 64)
    assert buckets.shape([[PromptSize(7, (40, 40))] * 2]) == RowShape(16, 4, 64)
    # Where images may come, a batch without any takes the program of one with few.
    assert buckets.shape([[PromptSize(16)]], images=True) == RowShape(16, 1, 64)
    for nothing in ([], [[]], [[], []]):
        assert buckets.shape(nothing) == RowShape(16)
        assert buckets.shape(nothing, images=True)[0] == 16
    with pytest.raises(InputError, match=r"config\.prompt\.token_buckets .* 49"):
        buckets.shape([[PromptSize(33), PromptSize(16)]])
    with pytest.raises(InputError, match=r"image of 132 patches is longer .* has 64: .* config\.prompt\.patch_buckets"):
        buckets.shape([[PromptSize(3, (132,))]])
    with pytest.raises(InputError, match=r"config\.prompt\.patch_buckets = .* of 1 prompts .* declare \(5, 64\)"):
        buckets.shape([[PromptSize(3, (40,) * 5)]])


def test_of_several_device_rows_the_longest_decides_and_the_one_with_most_images():
    buckets = Buckets((16, 32), ((1, 64), (2, 64)))
    sizes = [PromptSize(10, (64,)), PromptSize(6, (40,)), PromptSize(15), PromptSize(16)]
    assert buckets.shape([sizes[:2], sizes[2:]]) == RowShape(32, 2, 64)
    assert buckets.shape([sizes[:2], [PromptSize(1)]]) == RowShape(16, 2, 64)
    assert buckets.shape([sizes[:1], sizes[1:2], [], sizes[2:]]) == RowShape(32, 1, 64)
    # The same images side by side need fewer.
    assert buckets.shape([[sizes[0], sizes[2]], [sizes[1], sizes[3]]]) == RowShape(32, 1, 64)
    with pytest.raises(InputError, match=r"config\.prompt\.patch_buckets = .* of 1 prompts .* declare \(3, 64\)"):
        buckets.shape([[PromptSize(3, (64, 64, 64))], [PromptSize(3)]])


def test_declared_shapes_of_a_config(processor):
    merge, patch = processor.config.vision.merge_size**2, processor.config.vision.patch_size
    settings = {"token_buckets": (16, 32), "max_tokens": 24, "patch_buckets": ((1, 64),), "min_pixels": 0}
    declared = Buckets.of(settings, processor.config.vision)
    assert declared == Buckets((16, 32), ((1, 64),), merge, longest=24) and declared.row == 32
    assert declared.bounds(5) == Bounds(groups=5, group=0, prompt=24, response=0, image=merge, images=0)
    assert Buckets((16, 32), most=7).bounds(5) == Bounds(groups=5, group=0, prompt=32, response=0, images=7)
    assert Buckets.of(settings, processor.config.vision, 9 * merge * patch**2).smallest == 9 * merge
    larger = settings | {"min_pixels": 2 * merge * patch**2}
    assert Buckets.of(larger, processor.config.vision, 9 * merge * patch**2).smallest == 2 * merge
    with pytest.raises(InputError, match=rf"config\.prompt\.patch_buckets = .* multiple of {merge}"):
        Buckets.of(settings | {"patch_buckets": ((1, 65),)}, processor.config.vision)


# ---------------------------------------------------------------------- what rows hold


@pytest.mark.parametrize("numbers", [[[0, 1, 2]], [[1], [2, 0]], [[0, 1], [], [1, 1, 2], [2]]])
def test_rows_hold_every_prompt_one_behind_the_other_and_blank_padding(processor, prompts, numbers):
    buckets, config, pad = Buckets((256, 512), ((2, 256), (3, 256))), processor.config, processor.pad_token
    rows = [[prompts[n] for n in row] for row in numbers]
    shape = buckets.shape([[PromptSize.of(prompt) for prompt in row] for row in rows])
    batch = buckets.collate(rows, shape, 4, config, pad)
    assert shape == RowShape(256, 2, 256) and batch.tokens.shape == (len(rows), 256)
    assert batch.vision.patches.shape[:2] == (2 * len(rows), 256)
    assert (batch.prompt, batch.response) == (512, 0)
    assert [x.shape for x in batch.places] == [(len(rows), 4)] * 2 + [(len(rows), 0)] * 2
    blank = buckets.blank(len(rows), shape, 4, config, pad)
    vision, patches = batch.vision, batch.vision.patches.reshape(len(rows), 2 * 256, -1)
    taken = np.zeros((len(rows), 2 * 256), int)
    for number, row in enumerate(rows):
        at = 0
        for i, prompt in enumerate(row):
            here = slice(at, at + len(prompt))
            assert (batch.places.prompt_start[number, i], batch.places.prompt_length[number, i]) == (at, len(prompt))
            np.testing.assert_array_equal(batch.tokens[number, here], prompt.tokens)
            np.testing.assert_array_equal(batch.positions[number, :, here], prompt.positions)
            index = batch.visual_index[number, here]
            np.testing.assert_array_equal(index >= 0, prompt.tokens == config.image_token)
            # An image token's feature is merged from the four patches that its place in the image says.
            where = (index[index >= 0][:, None] * 4 + np.arange(4)).reshape(-1)
            np.testing.assert_array_equal(patches[number][where], prompt.patches)
            expected = [inputs.coordinates(grid, config.vision) for grid in prompt.grids]
            found = vision.coordinates.reshape(len(rows), -1, 2)[number, where]
            np.testing.assert_array_equal(found, np.concatenate([np.zeros((0, 2), int), *expected]))
            taken[number, where] += 1
            # Each image is a segment of its own.
            first = 0
            for grid in prompt.grids:
                own = where[first : first + np.prod(grid)]
                patch_row = 2 * number + own[0] // 256
                segments = vision.segments[patch_row, own % 256]
                assert (own // 256 == own[0] // 256).all() and len(set(segments.tolist())) == 1 and segments[0] > 0
                assert (vision.segments[patch_row] == segments[0]).sum() == len(own)
                assert vision.starts[patch_row, segments[0] - 1] == own.min() % 256
                assert vision.lengths[patch_row, segments[0] - 1] == len(own)
                first += len(own)
            at = here.stop
        assert not batch.places.prompt_length[number, len(row) :].any()
        assert (batch.tokens[number, at:] == pad).all() and (batch.visual_index[number, at:] == -1).all()
        assert not batch.positions[number, :, at:].any()
    assert (vision.lengths > 0).sum() == sum(len(prompt.grids) for row in rows for prompt in row)
    nowhere = vision.segments == 0
    np.testing.assert_array_equal(taken.reshape(-1, 256), ~nowhere)
    for name in ("patches", "table_weight", "coordinates", "windows"):
        if getattr(blank.vision, name) is not None:
            np.testing.assert_array_equal(getattr(vision, name)[nowhere], getattr(blank.vision, name)[nowhere])


def test_rows_without_an_image_have_no_vision_arrays(processor, prompts):
    buckets = Buckets((128,), ((1, 256),))
    shape = buckets.shape([[PromptSize.of(prompts[1])] * 2])
    assert buckets.collate([[prompts[1]] * 2], shape, 2, processor.config, processor.pad_token).vision is None


def test_a_device_row_is_what_it_would_be_alone(processor, prompts):
    """A feature's number, and a prompt's place, count within the row."""
    buckets, config, pad = Buckets((256,), ((2, 256),)), processor.config, processor.pad_token
    rows, shape = [[prompts[0], prompts[2]], [], [prompts[1], prompts[0]], [prompts[2]]], RowShape(256, 2, 256)
    batch = buckets.collate(rows, shape, 3, config, pad)
    for number, row in enumerate(rows):
        alone = buckets.collate([row], shape, 3, config, pad)
        of_vision = slice(2 * number, 2 * number + 2)
        part = dataclasses.replace(batch, vision=None), dataclasses.replace(alone, vision=None)
        jax.tree.map(lambda a, b, n=number: np.testing.assert_array_equal(a[n : n + 1], b), *part)
        both = batch.vision, alone.vision
        jax.tree.map(lambda a, b, here=of_vision: np.testing.assert_array_equal(a[here], b), *both)


def test_rows_without_a_prompt_are_blanks_of_the_agreed_shape(processor):
    buckets = Buckets((128,), ((2, 256),))
    batch = buckets.collate([[]] * 4, RowShape(128, 2, 256), 3, processor.config, processor.pad_token)
    assert batch.tokens.shape == (4, 128) and len(batch.vision.segments) == 8
    assert (batch.vision.segments == 0).all() and (batch.visual_index == -1).all()
    assert not batch.places.prompt_length.any()


# ---------------------------------------------------------------------- shapes that follow from prompts


def test_declared_shapes_hold_what_is_asked(processor):
    vision, declared = processor.config.vision, Buckets((48, 96), ((4, 64),))
    held = declared.holding([PromptSize(20, (64,)), PromptSize(93)], 4, vision, "float32")
    # No table is longer than these images need, and attention knows of no longer prompt.
    assert held == dataclasses.replace(declared, smallest=64, most=4, longest=96)
    assert declared.holding([PromptSize(93)], 4, vision, "float32") == dataclasses.replace(declared, longest=96)
    # Two of these fill a row, however many a prefill takes.
    wider = Buckets((96,), ((1, 64),)).holding([PromptSize(40, (64,)), PromptSize(96)], 5, vision, "float32")
    assert wider.patches == ((1, 64), (1, 128)) and wider.tokens == (96,) and wider.most == 5
    several = Buckets((96,), ((1, 64), (2, 64))).holding([PromptSize(20, (64,)), PromptSize(96)], 5, vision, "float32")
    assert several.patches == ((2, 64), (4, 64))
    sizes = [PromptSize(40, (64,)), PromptSize(300, (100, 100, 30))]
    larger = declared.holding(sizes, 4, vision, "float32")
    # One prompt's length, and that of as many usual ones.
    assert larger.tokens == (48, 96, 384, 768) and larger.longest == 304
    assert larger.images.longest >= 100 and larger.most == 4 * 3
    assert larger.possible(sizes, 4) == list(larger.patches)
    single = Buckets((512,), ((1, 64), (1, 256))).holding(sizes, 4, vision, "float32")
    assert single.patches == ((1, 64), (1, 256), (1, 512), (1, 896))
    assert single.possible(sizes, 4) == list(single.patches)
    assert Buckets(()).holding([PromptSize(40)], 4, vision, "float32") == Buckets((128, 256), longest=40)


@pytest.mark.parametrize(
    ("platform", "dtype", "attention", "patches"),
    [
        ("cpu", "bfloat16", "auto", ((5, 512), (9, 512))),
        ("tpu", "bfloat16", "auto", ((1, 1920), (1, 3712))),
        ("tpu", "float32", "auto", ((5, 512), (9, 512))),
        ("tpu", "bfloat16", "xla", ((5, 512), (9, 512))),
    ],
)
def test_images_share_one_row_where_a_kernel_skips_the_others_and_else_have_rows_of_their_length(
    processor, monkeypatch, platform, dtype, attention, patches
):
    """XLA's scores of one row with 9 such images would be six times as many as those of 9 rows."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    sizes = [PromptSize(500, (400,) * 4), PromptSize(30)]
    assert Buckets(()).holding(sizes, 4, processor.config.vision, dtype, attention).patches == patches


# ---------------------------------------------------------------------- every batch that can be drawn


def first(waiting: Sequence[PromptSize], prompts: int, row: int) -> list[PromptSize]:
    """Those that a prefill of a device row takes together (rollout/local/places.py): so many, or until it is full."""
    ends = itertools.accumulate(size.tokens for size in waiting)
    return [size for size, end in zip(waiting, ends, strict=True) if end <= row][:prompts]


def check_held(buckets: Buckets, rows: Sequence[Sequence[PromptSize]], shape: RowShape, prompts: int) -> None:
    """These prompts have room in a batch of that shape, and their images in its tables."""
    bounds = buckets.bounds(prompts)
    for row in rows:
        images = [buckets.images.counted(size.images) for size in row]
        places = place_images(images, shape.patches)
        assert sum(size.tokens for size in row) <= shape.length and len(row) <= prompts
        assert all(size.tokens <= bounds.prompt for size in row) and rows_of(places) <= shape.patch_rows
        for number in range(rows_of(places)):
            inside = sum(at == number for at, _ in places)
            assert inside <= shape.patches // bounds.image and inside <= (bounds.images or inside)


@pytest.mark.parametrize(("prompts", "shards"), [(1, 1), (4, 1), (4, 2), (2, 4), (3, 2)])
def test_every_batch_that_can_be_drawn_has_a_declared_shape(prompts, shards):
    random = np.random.default_rng(prompts + shards)
    declared = [tuple((n, 64) for n in (1, 2, 4, 8, 12, 24)), tuple((1, 64 * n) for n in (1, 2, 4, 8, 12, 24))]
    buckets = Buckets((16, 32, 48, 96), declared[prompts % 3 == 0])
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
        declared = buckets.shapes(sizes, images, prompts)
        assert len(set(declared)) == len(declared)
        for _ in range(60):
            # Prompts may come twice in a batch, as they do where an epoch ends.
            waiting = [[sizes[n] for n in random.integers(0, len(sizes), prompts)] for _ in range(shards)]
            rows = [first(row, prompts, buckets.row) for row in waiting]
            shape = buckets.shape(rows, images)
            assert shape in declared
            check_held(buckets, rows, shape, prompts)
        for size in sizes:
            assert buckets.shape([first([size] * prompts, prompts, buckets.row)] * shards, images) in declared


def test_an_image_over_half_a_row_packs_worse_than_its_size_says():
    """Four of 36 patches need a row each; four prompts of 44 in small images share three."""
    buckets = Buckets((48,), ((2, 64), (3, 64), (4, 64)))
    sizes = [PromptSize(9, (16, 16, 12))] * 4 + [PromptSize(9, (36,))] * 4
    assert buckets.shape([sizes[:4]]).patch_rows == 3 and buckets.shape([sizes[4:]]).patch_rows == 4
    assert {shape.patch_rows for shape in buckets.shapes(sizes, True, 4)} == {2, 3, 4}


def test_what_no_batch_can_need_is_not_declared():
    buckets = Buckets((16, 32, 48), ((2, 64), (4, 64), (8, 64)))
    # Two prompts fill the longest row, however many a prefill takes.
    assert buckets.shapes([PromptSize(20, (64,))] * 9, True, 8) == [RowShape(32, 2, 64), RowShape(48, 2, 64)]
    assert buckets.shapes([PromptSize(4, (4,))] * 9, True, 3) == [RowShape(16, 2, 64)]
    # Two images of half a row share one.
    assert Buckets((48,), ((4, 64),)).shapes([PromptSize(6, (32,))] * 8, True, 8) == [RowShape(48, 4, 64)]
    assert buckets.shapes([PromptSize(9), PromptSize(40)], False, 8) == [RowShape(16), RowShape(32), RowShape(48)]
    assert buckets.shapes([PromptSize(20)], False, 1) == [RowShape(32)]
    assert buckets.shapes([], True, 8) == []
    # Fewer tokens hold fewer images.
    assert buckets.shapes([PromptSize(9), PromptSize(12, (64,))], True, 4) == [
        RowShape(16, 2, 64), RowShape(32, 2, 64), RowShape(48, 2, 64), RowShape(48, 4, 64),
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"config\.prompt\.patch_buckets .* of 5 prompts .* declare \(10, 64\)"):
        buckets.shapes([PromptSize(9, (64, 64))] * 8, True, 8)
    with pytest.raises(InputError, match=r"config\.prompt\.token_buckets .* 49"):
        buckets.shapes([PromptSize(9), PromptSize(49)], False, 8)


@strategies.composite
def _stages(draw):
    """Buckets, prompts of a prefill, the sizes of a stage, and those that wait for each device row."""
    length = draw(strategies.integers(1, 30))
    images = strategies.lists(strategies.integers(1, length), max_size=4).map(tuple)
    size = strategies.builds(PromptSize, strategies.integers(1, 20), images)
    sizes = draw(strategies.lists(size, min_size=1, max_size=6))
    rows = sorted(draw(strategies.lists(strategies.integers(1, 20), min_size=1, max_size=6)))
    row, single = draw(strategies.integers(max(1, length // 2), 2 * length)), draw(strategies.booleans())
    declared = tuple((1, row * n) if single else (n, row) for n in rows)
    tokens = draw(strategies.lists(strategies.integers(5, 80), min_size=1, max_size=3))
    prompts, shards = draw(strategies.integers(1, 8)), draw(strategies.integers(1, 3))
    waiting = strategies.lists(strategies.sampled_from(sizes), max_size=prompts)
    buckets = Buckets(tuple(tokens), declared, draw(strategies.integers(1, 4)))
    return buckets, prompts, sizes, draw(strategies.lists(waiting, min_size=shards, max_size=shards))


@given(_stages())
def test_a_batch_of_sizes_that_passed_the_warm_up_fits_a_shape_that_it_compiled(stage):
    buckets, prompts, sizes, waiting = stage
    rows = [first(row, prompts, buckets.row) for row in waiting]
    try:
        declared = buckets.shapes(sizes, True, prompts)
        buckets.possible(sizes, prompts)
    except InputError:
        return  # said before the first step
    if any(rows):
        shape = buckets.shape(rows, True)
        assert shape in declared
        check_held(buckets, rows, shape, prompts)


@given(stage=_stages())
def test_shapes_that_follow_from_prompts_hold_whatever_is_drawn_from_them(checkpoint, stage):
    buckets, prompts, sizes, waiting = stage
    held = buckets.holding(sizes, prompts, config_lib.from_directory(checkpoint).vision, "float32")
    rows = [first(row, prompts, held.row) for row in waiting]
    assert set(held.tokens) >= set(buckets.tokens)
    assert [bool(row) for row in rows] == [bool(row) for row in waiting]
    if any(rows):
        shape = held.shape(rows, True)
        assert shape in held.shapes(sizes, True, prompts)
        check_held(held, rows, shape, prompts)


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
