"""Groups in packed rows: every token at its place, nothing cut; what is counted."""

import dataclasses

import jax
import numpy as np
import pytest

from capcur_jax.learner import packing
from capcur_jax.learner.packing import Item, Row, blank, collate
from capcur_jax.models.inputs import Processor
from capcur_jax.models.packed_rows import Bounds, RowShape


def row(length, start, weight=1.0):
    tokens = np.arange(length) + start
    return Row(tokens, weight, start / 10, np.float32(-tokens / 10))


# Two groups of three, in the order in which they were sampled.
GROUPS = [[row(3, 10), row(5, 20), row(1, 30, 0.0)], [row(2, 40), row(2, 50, 0.5), row(4, 60)]]


@pytest.fixture(scope="module")
def processor(checkpoint):
    return Processor.from_directory(checkpoint)


@pytest.fixture(scope="module")
def items(processor, make_image):
    prompts = [
        processor.prepare(processor.render([None, "red"]), [make_image(24, 32)]),
        processor.prepare(processor.render(["What is 3 x 4?"])),
    ]
    return [Item(prompt, group) for prompt, group in zip(prompts, GROUPS, strict=True)]


BOUNDS = Bounds(groups=3, group=3, prompt=64, response=8)


def collated(processor, rows, shape=RowShape(160, 1, 64), sampled=True):  # noqa: B008 - a tuple
    return collate(rows, shape, BOUNDS, processor.config, processor.pad_token, sampled=sampled)


def test_a_row_has_its_groups_one_behind_the_other(processor, items):
    """Each as its prompt and its responses; what is not filled is padding of length 0."""
    batch = collated(processor, [items, [items[1]]])
    packed, places = batch.rows, batch.rows.places
    for a, members in enumerate([items, items[1:]]):
        want = [part for item in members for part in (item.prompt.tokens, *(row.tokens for row in item.rows))]
        want = np.concatenate(want)
        np.testing.assert_array_equal(packed.tokens[a, : len(want)], want)
        assert (packed.tokens[a, len(want) :] == processor.pad_token).all()
        starts = np.cumsum([0, *(item.tokens for item in members)])
        np.testing.assert_array_equal(places.prompt_start[a, : len(members)], starts[:-1])
        assert (places.prompt_length[a, len(members) :] == 0).all()
        assert (places.response_length[a, 3 * len(members) :] == 0).all()
        for b, item in enumerate(members):
            at = starts[b] + len(item.prompt)
            positions = packed.positions[a, :, starts[b] : at]
            np.testing.assert_array_equal(positions, item.prompt.positions)
            for r, member in enumerate(item.rows, 3 * b):
                length = len(member.tokens)
                assert (places.response_start[a, r], places.response_length[a, r]) == (at, length)
                goes_on = item.prompt.next_position + np.arange(length)
                np.testing.assert_array_equal(packed.positions[a, :, at : at + length], np.tile(goes_on, (3, 1)))
                number = 9 * a + r
                assert batch.responses.weights[number] == member.weight
                assert batch.responses.advantages[number] == np.float32(member.advantage)
                sampler = batch.responses.sampler_logprobs[number]
                np.testing.assert_array_equal(sampler, [*member.logprobs, *[0] * (8 - length)])
                at += length
    assert {x.dtype for x in jax.tree.leaves(places)} == {packed.tokens.dtype} == {np.dtype(np.int32)}


def test_images_follow_their_tokens(processor, items):
    """Wherever a group lies, its image tokens find the same features; text tokens find none."""
    first, second = collated(processor, [items]).rows, collated(processor, [items[::-1]]).rows
    at, length = items[1].tokens, len(items[0].prompt)
    np.testing.assert_array_equal(first.visual_index[0, :length], second.visual_index[0, at : at + length])
    shown = first.visual_index[0] >= 0
    assert shown.sum() == (items[0].prompt.visual_index >= 0).sum() and not shown[length:].any()
    np.testing.assert_array_equal(first.vision.patches, second.vision.patches)


def test_what_an_objective_does_not_use_is_none(processor, items):
    of = collated(processor, [items], sampled=False).responses
    assert (of.advantages, of.sampler_logprobs, of.old_logprobs, of.reference_logprobs) == (None,) * 4


def test_more_than_a_row_holds_is_an_error_and_never_cut(processor, items):
    with pytest.raises(ValueError):
        collated(processor, [items], RowShape(40, 1, 64))


@pytest.mark.parametrize("longest", [22, 24, 28, 200])
def test_a_group_longer_than_a_row_is_in_parts(items, longest):
    prompt = items[1].prompt
    length, lengths = len(prompt), [8, 3, 5, 8, 1]
    whole = Item(prompt, [row(n, 10 * n) for n in lengths])
    parts = list(whole.parts(length + longest - 14))
    assert all(part.tokens <= length + longest - 14 and part.prompt is prompt for part in parts)
    assert [part.again for part in parts] == [False] + [True] * (len(parts) - 1)
    assert sorted(len(r.tokens) for part in parts for r in part.rows) == sorted(lengths)
    assert len(parts) == {22: 4, 24: 3, 28: 2, 200: 1}[longest]
    if longest == 200:
        assert parts == [whole]


# ---------------------------------------------------------------------- blanks, counts


@pytest.mark.parametrize(("old", "reference"), [(False, False), (True, True), (False, True)])
def test_a_blank_has_the_shape_of_what_is_packed(processor, items, old, reference):
    shape = RowShape(160, 1, 64)
    packed = collated(processor, [items])
    empty = blank(1, shape, BOUNDS, processor.config, sampled=True, old=old, reference=reference)
    assert jax.tree.structure(packed.rows) == jax.tree.structure(empty.rows)
    for a, b in zip(jax.tree.leaves(packed.rows), jax.tree.leaves(empty.rows), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    for field in dataclasses.fields(packed.responses):
        mine, theirs = getattr(packed.responses, field.name), getattr(empty.responses, field.name)
        wanted = {"old_logprobs": old, "own": old, "reference_logprobs": reference}.get(field.name)
        if wanted is None:
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), field.name
        else:
            assert mine is None and (theirs is not None) == wanted
            assert theirs is None or theirs.shape[0] == 9
    targets = blank(1, shape, BOUNDS, processor.config, sampled=False).responses
    assert targets.advantages is targets.sampler_logprobs is None


def test_slots_are_counted(items):
    lengths, responses = [len(item.prompt) for item in items], 17
    patches = len(items[0].prompt.patches)
    one = np.array([sum(lengths) + responses, 2 * 160, responses + 3 * sum(lengths), patches, 2 * 64])
    np.testing.assert_array_equal(packing.slots([items, []], RowShape(160, 1, 64)), one)
    # The prompt of a second part is not counted again.
    parts = [items[0]._replace(rows=items[0].rows[:2]), items[0]._replace(rows=items[0].rows[2:], again=True)]
    two = packing.slots([parts, [items[1]]], RowShape(160, 1, 64))
    np.testing.assert_array_equal(two, one)
    shares, (real, computed, full) = packing.shares(one), one[:3]
    assert shares == pytest.approx(
        {"token_padding": 1 - real / computed, "packing": real / full, "patch_padding": 1 - patches / one[4]}
    )
    assert "patch_padding" not in packing.shares(np.array([1, 2, 1, 0, 0]))
