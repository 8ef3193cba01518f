"""Images placed in rows of patches that are declared: whole, apart, and never more than a row holds."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, strategies

from capcur_jax.errors import InputError
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.models.config import from_directory
from capcur_jax.models.image_rows import PatchBuckets, assign_rows, blank_vision, most_rows, place_images, rows_of
from capcur_jax.models.packed_rows import RowShape


def test_large_images_are_placed_first_and_small_ones_fill_the_fullest_row():
    assert assign_rows([10, 60, 36, 24, 4], 64) == [(2, 0), (0, 0), (1, 0), (1, 36), (0, 60)]
    assert assign_rows([64, 64], 64) == [(0, 0), (1, 0)]
    assert assign_rows([], 64) == []
    with pytest.raises(
        InputError, match=r"image of 65 patches is longer than the longest row of patches, which has 64: declare"
    ):
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
    for row in range(np.count_nonzero(filled)):
        largest = max(size for (r, _), size in zip(places, sizes, strict=True) if r == row)
        assert filled[:row].min(initial=256) + largest > 256
        starts = [at for r, at in places if r == row]
        assert starts == sorted(starts) and starts[0] == 0


@pytest.mark.parametrize("declared", [
    (64, 128), ((2, 64), (1, 64)), ((1, 128), (1, 64)), ((1, 64), (2, 128)), ((2, 64), (2, 128)), ((1, 2, 3),),
])  # fmt: skip
def test_declared_patches_are_pairs_that_rise_in_one_way(declared):
    with pytest.raises(
        InputError, match=r"the patches of config\.packing\.shapes = .* give \(rows, patches of a row\)"
    ):
        PatchBuckets(declared, key="the patches of config.packing.shapes")
    with pytest.raises(InputError, match=r"config\.prompt\.patch_buckets = .* give \(rows, patches of a row\)"):
        Buckets((16,), declared)


def test_the_smallest_bucket_that_holds_the_images():
    one, many = PatchBuckets(((1, 64), (1, 128), (1, 192))), PatchBuckets(((1, 64), (2, 64), (4, 64)))
    assert [one.bucket(each) for each in ([(64,)], [(40,), (40,)], [(68,)], [()])] == [
        (1, 64), (1, 128), (1, 128), (1, 64),
    ]  # fmt: skip
    assert [many.bucket(each) for each in ([(64,)], [(40,), (40,)], [(24,), (24, 40)], [(64,), (8, 64)])] == [
        (1, 64), (2, 64), (2, 64), (4, 64),
    ]  # fmt: skip
    assert (one.fitting([(196,)]), many.fitting([(68,)]), many.fitting([(64,)] * 5)) == (3, 3, 3)
    assert PatchBuckets().bucket([()]) == (0, 0)
    with pytest.raises(InputError, match=r"image of 196 patches is longer .* has 192"):
        one.bucket([(4,), (196,)])
    with pytest.raises(InputError, match=r"images of 2 prompts of a device row need more; declare \(5, 64\)"):
        many.bucket([(64, 64), (64, 64, 64)])
    with pytest.raises(InputError, match=r"images of 2 prompts of a device row need more; declare \(1, 256\)"):
        one.bucket([(64, 64), (128,)])


def test_slots_of_a_prompt_are_a_bound_on_what_it_takes():
    one, many = PatchBuckets(((1, 64), (1, 128))), PatchBuckets(((1, 64), (2, 64)))
    assert [one.slots(images) for images in ((), (40,), (40, 40))] == [0, 40, 80]
    assert [many.slots(images) for images in ((), (40,), (40, 40), (24, 40))] == [0, 64, 128, 64]


@pytest.mark.parametrize("config", ["checkpoint", "windowed_checkpoint"])
def test_an_image_travels_as_its_bytes(config, request):
    """A byte of a channel of a pixel, and 12 to 60 of where a patch is."""
    vision = from_directory(request.getfixturevalue(config)).vision
    blank = blank_vision(2, 64, vision, 16)
    assert blank.patches.nbytes == 2 * 64 * 3 * vision.patch_size**2
    rest = sum(leaf.nbytes for leaf in jax.tree.leaves(blank)) - blank.patches.nbytes
    assert blank.starts.shape == blank.lengths.shape == (2, 4) and 12 * 128 <= rest <= 60 * 128


def test_tables_are_as_long_as_the_images_of_a_row_can_be(checkpoint):
    """One icon beside large images makes the smallest image tiny; then what prompts have is the better bound."""
    vision = from_directory(checkpoint).vision
    tables = [blank_vision(2, 5120, vision, *bounds).starts.shape for bounds in ((16,), (16, 6), (2560, 6), (5120, 6))]
    assert tables == [(2, 320), (2, 6), (2, 2), (2, 1)]


def test_a_row_holds_no_more_images_than_its_tables_name():
    """An image that is smaller than the smallest counts as that one."""
    buckets = PatchBuckets(((1, 64), (2, 64)), smallest=16)
    assert buckets.bucket([(4,) * 4]) == (1, 64)
    assert buckets.bucket([(4,) * 5]) == (2, 64)
    assert buckets.counted((4, 20)) == (16, 20)


def test_images_of_several_prompts_need_no_more_rows_than_the_prompts_alone():
    """Together 5 4 3 3 3 2 take three rows of ten, each largest first in the fullest row that holds it."""
    buckets = Buckets((512,), ((1, 10), (2, 10)), smallest=1)
    sizes = [PromptSize(100, (10,)), PromptSize(100, (5, 3, 2)), PromptSize(100, (4, 3, 3))]
    assert buckets.shapes(sizes, True, 2) == [RowShape(512, 1, 10), RowShape(512, 2, 10)]
    assert buckets.shape([sizes[1:]], True) == RowShape(512, 2, 10)
    places = place_images([size.images for size in sizes[1:]], 10)
    assert [row for row, _ in places] == [0, 0, 0, 1, 1, 1] and rows_of(places) == 2
    assert rows_of(assign_rows([5, 3, 2, 4, 3, 3], 10)) == 3


def test_a_batch_that_would_fail_in_a_step_fails_before_the_first_one():
    """The prompts with most patches fit three rows; four with 70 each need four."""
    sizes = [PromptSize(100, (50, 25))] * 4 + [PromptSize(100, (70,))] * 4
    with pytest.raises(InputError, match=r"images of 4 prompts of a device row need more; declare \(4, 100\)"):
        Buckets((512,), ((3, 100),)).shapes(sizes, True, 4)
    assert Buckets((512,), ((3, 100), (4, 100))).shape([sizes[4:]], True) == RowShape(512, 4, 100)


def test_a_bound_on_all_patches_leaves_fewer_buckets():
    """Of many small prompts a row's tokens hold few."""
    one, many = PatchBuckets(((1, 64), (1, 128), (1, 256))), PatchBuckets(((1, 64), (2, 64), (4, 64)))
    for buckets in (one, many):
        assert buckets.possible([(64,), ()], 4) == list(buckets.declared)
        assert buckets.possible([(64,), ()], 4, 64) == list(buckets.declared[:1])
        assert buckets.possible([(64,), ()], 4, 128) == list(buckets.declared[:2])
        assert buckets.possible([(64,), ()], 4, 191) == list(buckets.declared[:2])  # nor have three room in that
        assert buckets.possible([()], 4) == list(buckets.declared[:1])
    with pytest.raises(InputError, match=r"images of 4 prompts of a device row need more; declare \(1, 320\)"):
        one.possible([(64, 64)], 4, 5 * 64)
    with pytest.raises(InputError, match=r"images of 4 prompts of a device row need more; declare \(5, 64\)"):
        many.possible([(64, 64)], 4, 5 * 64)
    assert PatchBuckets().possible([()], 4) == [(0, 0)]


@given(
    strategies.lists(strategies.lists(strategies.integers(1, 30), max_size=4).map(tuple), min_size=1, max_size=9),
    strategies.integers(30, 70),
)
def test_no_prompts_take_more_rows_than_the_bound_on_them_says(images, length):
    """Whatever bounds their number and their patches."""
    total = sum(map(sum, images))
    assert rows_of(place_images(images, length)) <= most_rows(set(images), len(images), max(total, 1), length)
