"""Buckets and packing: every row in its place, the smallest declared shape, nothing cut."""

import numpy as np
import pytest

from capcur_jax.data.packing import pack, pack_rows
from capcur_jax.errors import InputError
from capcur_jax.models.batching import BatchShape, Buckets

ROWS = [np.arange(3) + 10, np.arange(5) + 20, np.arange(1) + 30, np.arange(2) + 40]


@pytest.fixture(scope="module")
def prompts(processor):
    return Buckets((16,), 4, ()).blank(BatchShape(2, 16, 0), processor.config, processor.pad_token)


def test_rows_are_padded_on_the_right():
    packed = pack_rows([np.array([1, 2]), np.array([], int), np.array([3, 4, 5])], 3, -7, np.int32)
    np.testing.assert_array_equal(packed, [[1, 2, -7], [-7, -7, -7], [3, 4, 5]])
    assert packed.dtype == np.int32


def test_responses_keep_order_lengths_and_log_probs(prompts):
    logprobs = [np.float32(-row / 10) for row in ROWS]
    advantages = np.array([1, -1, 0.5, -0.5], np.float32)
    batch = pack(prompts, ROWS, (4, 8, 16), 99, advantages=advantages, sampler_logprobs=logprobs)
    assert batch.tokens.shape == batch.sampler_logprobs.shape == (4, 8)
    assert (batch.tokens.dtype, batch.lengths.dtype) == (np.int32, np.int32)
    assert batch.sampler_logprobs.dtype == np.float32
    np.testing.assert_array_equal(batch.lengths, [3, 5, 1, 2])
    for r, row in enumerate(ROWS):
        np.testing.assert_array_equal(batch.tokens[r], [*row, *[99] * (8 - len(row))])
        np.testing.assert_array_equal(batch.sampler_logprobs[r], [*logprobs[r], *[0] * (8 - len(row))])
    assert batch.prompts is prompts and batch.advantages is advantages


def test_what_an_objective_does_not_use_is_none(prompts):
    batch = pack(prompts, ROWS, (8,), 0)
    unused = (batch.advantages, batch.sampler_logprobs, batch.old_logprobs, batch.reference_logprobs)
    assert unused == (None,) * 4


def test_a_last_token_that_is_the_pad_token_counts(prompts):
    batch = pack(prompts, [np.array([5, 6, 0]), np.array([0])], (4,), 0)
    np.testing.assert_array_equal(batch.lengths, [3, 1])


def test_a_response_over_the_buckets_is_an_error_and_never_cut(prompts):
    with pytest.raises(InputError, match=r"config\.rollout\.response_buckets = \(2, 4\) has no bucket for 5"):
        pack(prompts, ROWS, (2, 4), 0)
