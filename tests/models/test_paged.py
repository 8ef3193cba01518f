"""Attention over pages: the reference against a dense softmax, the kernels against the reference, and what is written.

Kernels run in Pallas' interpret modes: test_paged_compiled.py compiles them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from capcur_jax.devices import sharding
from capcur_jax.models import paged
from capcur_jax.models.paged import Tables

N, K, H, S = 8, 2, 16, 8


class Case(NamedTuple):
    """Rows and the pages of a layer. Rows 0 and 1 share their first pages."""

    q: jax.Array
    keys: jax.Array
    values: jax.Array
    table: jax.Array
    lengths: jax.Array

    @classmethod
    def of(cls, lengths, pages: int, dtype=jnp.float32, size: int = S, head: int = H, kv: int = K) -> Case:
        random, C = np.random.default_rng(len(lengths) + pages), len(lengths)
        normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
        count = C * pages + 3
        table = random.permutation(count)[: C * pages].reshape(C, pages)
        if C > 1:
            table[1, : pages // 2] = table[0, : pages // 2]
        arrays = normal(C, N, head), normal(kv, count, size, head), normal(kv, count, size, head)
        return cls(*arrays, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32))

    def given(self) -> tuple:
        """As `attend` has it on a device: queries, pages, tables, lengths."""
        return self.q, (self.keys, self.values), self.table, self.lengths


def dense(case: Case) -> np.ndarray:
    """A softmax over each row's tokens, one after another: [C, N, H]; of a row without any, zeros."""
    q, keys, values = (np.asarray(x, np.float64) for x in case[:3])
    out = np.zeros(q.shape)
    for row, length in enumerate(case.lengths):
        for head in range(q.shape[1]) if length else ():
            group = head * len(keys) // q.shape[1]
            k, v = (np.concatenate(x[group, case.table[row]])[:length] for x in (keys, values))
            scores = k @ q[row, head] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v
    return out


def assert_close(case: Case, ours, theirs, **tolerance) -> None:
    """Of rows that have something; the others' are numbers."""
    ours, theirs, has = np.asarray(ours, np.float32), np.asarray(theirs, np.float32), np.asarray(case.lengths) > 0
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    np.testing.assert_allclose(ours[has], theirs[has], **tolerance)


@pytest.mark.parametrize(
    ("lengths", "pages"), [([1], 1), ([8, 0, 3], 1), ([0, 17, 24, 1, 16], 3), ([40, 33, 0], 5), ([72, 72], 9)]
)
@pytest.mark.parametrize("kv", [1, 2, 8])
def test_the_reference_is_a_softmax_over_each_row_s_tokens(lengths, pages, kv):
    case = Case.of(lengths, pages, kv=kv)
    assert_close(case, jax.jit(paged.reference)(*case.given()), dense(case), atol=2e-6)


def test_a_page_of_one_s_own_needs_no_table():
    case = Case.of([5, 0, 8], 1)
    case = case._replace(
        keys=case.keys[:, :3], values=case.values[:, :3], table=jnp.arange(3, dtype=jnp.int32)[:, None]
    )
    elsewhere = case._replace(table=jnp.zeros((3, 1), jnp.int32))
    assert_close(case, paged.reference(*elsewhere.given(), own=True), dense(case), atol=2e-6)
    np.testing.assert_array_equal(paged.reference(*elsewhere.given(), own=True), paged.reference(*case.given()))


def test_what_lies_behind_a_row_s_tokens_changes_nothing():
    case = Case.of([11, 9], 3)
    littered = case._replace(table=case.table.at[:, 2].set(7), keys=case.keys.at[:, case.table[0, 1], 3:].set(9.0))
    np.testing.assert_array_equal(paged.reference(*case.given()), paged.reference(*littered.given()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("lengths", "pages", "size"),
    [([1, 0, 5], 1, 16), ([16, 33, 48], 3, 16), ([0, 128, 77], 8, 16), ([260, 272, 1, 0], 17, 16), ([300, 5], 3, 128)],
)
def test_the_gpu_s_kernel_is_the_reference(lengths, pages, size, dtype):
    """Few pages, which are padded to those of all splits, and more than these take at once."""
    case = Case.of(lengths, pages, jnp.dtype(dtype), size, head=32)
    assert_close(case, paged.on_gpu(*case.given(), interpret=True), paged.reference(*case.given()), **TOLERANCE[dtype])


# Of 16 bits: a rounding of each split's sum, of the weights and of the result.
TOLERANCE = {"float32": {"atol": 2e-6}, "bfloat16": {"atol": 0.03}}


@pytest.mark.parametrize(("lengths", "pages", "kv"), [([1, 0, 40], 3, 2), ([0, 0, 129, 16], 9, 1), ([288], 18, 8)])
def test_the_tpu_s_kernel_is_the_reference(lengths, pages, kv):
    """Rows without tokens between others: the kernel fetches the pages of the next one that has some. The interpreter
    multiplies as a TPU does, in 16 bits whatever the type."""
    case = Case.of(lengths, pages, jnp.bfloat16, 16, head=128, kv=kv)
    with pltpu.force_tpu_interpret_mode():
        ours = jax.jit(paged.on_tpu)(*case.given())
    assert_close(case, ours, paged.reference(*case.given()), **TOLERANCE["bfloat16"])


@pytest.mark.parametrize("own", [False, True])
def test_each_live_row_writes_one_place_and_others_none(own):
    C, M = 5, 1 if own else 3
    random = np.random.default_rng(0)
    normal = lambda *shape, dtype=jnp.float32: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    keys, values = (normal(K, C if own else 19, S, H) for _ in range(2))
    table = random.permutation(19)[: C * M].reshape(C, M)
    at, live = np.array([0, S * M - 1, 3, 9 % (S * M), S * M + 5]), np.array([True, True, False, True, False])
    k, v = (normal(C, K, H, dtype=jnp.bfloat16) for _ in range(2))
    write = jax.jit(lambda *arrays: paged.write(sharding.single(), *arrays[:3], Tables(arrays[3], own), *arrays[4:]))
    got = write((keys, values), k, v, jnp.asarray(table, jnp.int32), jnp.asarray(at), jnp.asarray(live))
    want = [np.array(keys), np.array(values)]
    for row in np.flatnonzero(live):
        page = row if own else table[row, at[row] // S]
        for pages, x in zip(want, (k, v), strict=True):
            pages[:, page, at[row] % S] = np.asarray(x[row], np.float32)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_whole_pages_are_filled_where_they_belong_and_past_the_last_nowhere():
    random = np.random.default_rng(0)
    keys, values = (jnp.asarray(random.normal(size=(K, 6, S, H)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(random.normal(size=(3 * S, K, H)), jnp.float32) for _ in range(2))
    want = [np.array(keys), np.array(values)]
    for pages, x in zip(want, (k, v), strict=True):
        for start, page in ((5, 4), (S, 0)):
            pages[:, page] = np.asarray(x[start : start + S]).swapaxes(0, 1)
    got = jax.jit(paged.fill)((keys, values), k, v, jnp.array([5, 0, S, 0]), jnp.array([4, 6, 0, 9]))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
