"""Responses sorted into slabs: every row with its prompt, the fewest slots, nothing cut; what is counted."""

import dataclasses
import itertools

import numpy as np
import pytest

from capcur_jax.errors import InputError
from capcur_jax.learner import packing
from capcur_jax.learner.packing import Row, UpdateBatch, blank, in_ranks, pack, pack_rows, ranks, smallest_lengths
from capcur_jax.models.batching import BatchShape, Buckets
from capcur_jax.models.inputs import Processor


def row(length, start, weight=1.0):
    tokens = np.arange(length) + start
    return Row(tokens, weight, start / 10, np.float32(-tokens / 10))


# Two groups of three, in the order in which they were sampled.
GROUPS = [[row(3, 10), row(5, 20), row(1, 30, 0.0)], [row(2, 40), row(2, 50, 0.5), row(4, 60)]]


def test_rows_are_padded_on_the_right():
    packed = pack_rows([np.array([1, 2]), np.array([], int), np.array([3, 4, 5])], 3, -7, np.int32)
    np.testing.assert_array_equal(packed, [[1, 2, -7], [-7, -7, -7], [3, 4, 5]])
    assert packed.dtype == np.int32


@pytest.mark.parametrize("counts", [(3,), (2, 1), (1, 2), (1, 1, 1)])
def test_each_slab_has_the_rows_of_its_ranks_group_after_group(counts):
    slabs = pack(GROUPS, counts, (8,) * len(counts), 99)
    ranked = [sorted(group, key=lambda row: len(row.tokens)) for group in GROUPS]
    start = 0
    for slab, count in zip(slabs, counts, strict=True):
        want = [row for group in ranked for row in group[start : start + count]]
        start += count
        assert slab.tokens.shape == slab.sampler_logprobs.shape == (2 * count, 8)
        assert (slab.tokens.dtype, slab.lengths.dtype) == (np.int32, np.int32)
        assert {a.dtype for a in (slab.weights, slab.advantages, slab.sampler_logprobs)} == {np.dtype(np.float32)}
        for r, row in enumerate(want):
            missing = 8 - len(row.tokens)
            np.testing.assert_array_equal(slab.tokens[r], [*row.tokens, *[99] * missing])
            np.testing.assert_array_equal(slab.sampler_logprobs[r], [*row.logprobs, *[0] * missing])
            assert slab.lengths[r] == len(row.tokens) and slab.weights[r] == row.weight
            assert slab.advantages[r] == np.float32(row.advantage)
        assert slab.old_logprobs is None and slab.reference_logprobs is None
    assert start == 3


def test_rows_of_one_length_keep_their_order():
    assert in_ranks(GROUPS[1]) == [0, 1, 2] and in_ranks(GROUPS[0]) == [2, 0, 1]


def test_slabs_may_differ_in_length():
    short, long = pack(GROUPS, (2, 1), (3, 5), 0)
    assert short.tokens.shape == (4, 3) and long.tokens.shape == (2, 5)


def test_what_an_objective_does_not_use_is_none():
    (slab,) = pack([[Row(np.arange(3), 0.5)]], (1,), (8,), 0, sampled=False)
    unused = (slab.advantages, slab.sampler_logprobs, slab.old_logprobs, slab.reference_logprobs)
    assert unused == (None,) * 4 and slab.weights == np.float32(0.5)


def test_a_last_token_that_is_the_pad_token_counts():
    (slab,) = pack([[Row(np.array([5, 6, 0]), 1.0)], [Row(np.array([0]), 1.0)]], (1,), (4,), 0, sampled=False)
    np.testing.assert_array_equal(slab.lengths, [3, 1])


# ---------------------------------------------------------------------- lengths


def test_ranks_are_the_slabs_or_all():
    assert ranks(5, (3, 2)) == (3, 2) and ranks(5, ()) == (5,)
    assert ranks(1, (3, 2)) == (1,)  # sft rows


@pytest.mark.parametrize("slabs", [(3, 1), (3, 3), (5, 0), (6, -1)])
def test_slabs_that_do_not_share_a_group_out_are_an_error(slabs):
    with pytest.raises(InputError, match=r"config\.packing\.slabs = .* whole numbers that add up to 5 responses"):
        ranks(5, slabs)


def test_needed_lengths_hold_the_longest_of_each_slab():
    assert packing.needed_lengths(GROUPS, (3,)) == (5,)
    assert packing.needed_lengths(GROUPS, (2, 1)) == (3, 5)
    assert packing.needed_lengths(GROUPS, (1, 1, 1)) == (2, 3, 5)
    random = np.random.default_rng(0)
    for counts in ((4,), (3, 1), (1, 2, 1)):
        groups = [[row(int(n), 1) for n in random.integers(1, 20, 4)] for _ in range(6)]
        needed = packing.needed_lengths(groups, counts)
        slabs = pack(groups, counts, needed, 0)  # nothing is cut, and nothing is left over
        assert tuple(int(slab.lengths.max()) for slab in slabs) == needed
        assert sum(int(slab.lengths.sum()) for slab in slabs) == sum(len(r.tokens) for g in groups for r in g)


def test_the_bucket_with_the_fewest_slots_that_holds_the_rows():
    buckets = ((4, 16), (8, 8), (8, 16), (2, 4))
    assert smallest_lengths(buckets, (2, 4), (3, 1)) == (2, 4)
    assert smallest_lengths(buckets, (3, 8), (3, 1)) == (4, 16)  # 28 slots a group, not 32
    assert smallest_lengths(buckets, (3, 8), (1, 3)) == (8, 8)
    assert smallest_lengths(buckets, (5, 9), (3, 1)) == (8, 16)
    random = np.random.default_rng(0)
    for need in random.integers(1, 17, (50, 2)):
        fitting = [b for b in buckets if b[0] >= need[0] and b[1] >= need[1]]
        if fitting:
            assert smallest_lengths(buckets, need, (3, 1)) == min(fitting, key=lambda b: 3 * b[0] + b[1])


def test_a_response_over_the_buckets_is_an_error_and_never_cut():
    with pytest.raises(InputError, match=r"config\.packing\.buckets = \(\(2,\), \(4,\)\) has none for rows of \(5,\)"):
        smallest_lengths(((2,), (4,)), (5,), (3,))
    with pytest.raises(ValueError):
        pack(GROUPS, (3,), (4,), 0)


def test_sorted_groups_have_neighbours_of_like_length():
    """By the longest slab first: it is what costs."""
    random, counts = np.random.default_rng(1), (2, 1)
    groups = [[row(int(n), 1) for n in random.integers(1, 9, 3)] for _ in range(12)]
    ordered = sorted(groups, key=lambda group: packing.sort_key(7, group, counts))
    needs = [packing.needed_lengths([group], counts) for group in ordered]
    assert [need[1] for need in needs] == sorted(need[1] for need in needs)
    for a, b in itertools.pairwise(needs):
        assert a[1] < b[1] or a[0] <= b[0]
    assert packing.sort_key(5, groups[0], counts) < packing.sort_key(6, groups[0], counts)


# ---------------------------------------------------------------------- blanks, counts


@pytest.fixture(scope="module")
def processor(checkpoint):
    return Processor.from_directory(checkpoint)


@pytest.mark.parametrize(("old", "reference"), [(False, False), (True, True), (False, True)])
def test_a_blank_has_the_shape_of_what_is_packed(old, reference):
    packed, blanks = (
        pack(GROUPS, (2, 1), (3, 5), 0),
        blank(2, (2, 1), (3, 5), sampled=True, old=old, reference=reference),
    )
    for a, b in zip(packed, blanks, strict=True):
        for field in dataclasses.fields(a):
            mine, theirs = getattr(a, field.name), getattr(b, field.name)
            if field.name in ("old_logprobs", "reference_logprobs"):
                wanted = old if field.name == "old_logprobs" else reference
                assert (theirs is not None) == wanted
                assert theirs is None or (theirs.shape, theirs.dtype) == (b.tokens.shape, np.float32)
            elif field.name == "own":  # beside the old log-probs: whose rows take their own
                assert (theirs is not None) == old
                assert theirs is None or (theirs.shape, theirs.dtype) == (b.tokens.shape[:1], bool)
            else:
                assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), field.name
    (sft,) = blank(2, (1,), (4,), sampled=False)
    assert sft.advantages is sft.sampler_logprobs is None


def test_slots_are_counted(processor, make_image):
    buckets = Buckets((64, 128), ((2, 64),))
    prompts = [
        processor.prepare(processor.render([None, "red"]), [make_image(24, 32)]),
        processor.prepare(processor.render(["What is 3 x 4?"])),
    ]
    batch = UpdateBatch(
        buckets.collate(prompts, processor.config, processor.pad_token), pack(GROUPS, (2, 1), (4, 8), 0)
    )
    text = UpdateBatch(buckets.blank(BatchShape(2, 64), processor.config, 0), pack(GROUPS, (3,), (8,), 0))
    lengths, responses = [len(prompt) for prompt in prompts], 17
    patches = len(prompts[0].patches)
    T = batch.prompts.tokens.shape[1]
    one = np.array([
        sum(lengths) + responses, 2 * T + 2 * (2 * 4 + 8), responses + 3 * sum(lengths), patches,
        batch.prompts.vision.segments.size,
    ])  # fmt: skip
    two = np.array([2 + responses, 2 * 64 + 6 * 8, responses + 3 * 2, 0, 0])
    np.testing.assert_array_equal(packing.slots([batch]), one)
    np.testing.assert_array_equal(packing.slots([batch, text]), one + two)
    shares = packing.shares(one + two)
    real, computed, full = (one + two)[:3]
    assert shares == pytest.approx(
        {
            "token_padding": 1 - real / computed,
            "packing": real / full,
            "patch_padding": 1 - patches / batch.prompts.vision.segments.size,
        }
    )
    assert "patch_padding" not in packing.shares(two)
