"""Attention of packed rows and rows of patches: every kernel against a dense mask, in values and gradients.

splash runs in Pallas' interpret mode; cuDNN's calls have a twin in plain XLA that keeps their contract, with offsets in
numbers, statistics by segments and NaN wherever nothing is written. tests/models/test_packed_compiled.py compiles both.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capcur_jax.models import packed_gpu, packed_tpu
from capcur_jax.models.packed import Limits, Packed, Places, Spans

GPU = {"implementation": "xla"}
TPU = {"interpret": True}
WAYS = {"gpu": (packed_gpu, GPU), "tpu": (packed_tpu, TPU)}
TOKENS = 320  # of a row: two of them are five blocks of 128
LONGEST = {"prompt": 70, "response": 60}


def drawn(rng, rows=2, groups=3, responses=3, tokens=TOKENS):
    """Groups of random lengths in rows, one of them and some responses absent, padding behind."""
    shapes = (rows, groups), (rows, groups), (rows, groups, responses), (rows, groups, responses)
    start, length, own_start, own_length = (np.zeros(shape, np.int32) for shape in shapes)
    for row, group in np.ndindex(rows, groups):
        if (row, group) == (1, 1):
            continue
        room = (tokens - own_start[row].max(initial=0) - 60) // (groups - group) - 1
        at = max((own_start[row] + own_length[row]).max(), (start[row] + length[row]).max())
        start[row, group], length[row, group] = at, rng.integers(1, min(LONGEST["prompt"], room // 2) + 1)
        at += length[row, group]
        for own in range(responses):
            size = rng.integers(0, min(LONGEST["response"], room // (2 * responses)) + 1)
            own_start[row, group, own], own_length[row, group, own] = (at, size) if size else (0, 0)
            at += size
        assert at <= tokens
    return Places(start, length, own_start.reshape(rows, -1), own_length.reshape(rows, -1))


def alone(places):
    """The prompts without their responses, whose tokens are padding then."""
    return places._replace(response_start=places.response_start[:, :0], response_length=places.response_length[:, :0])


def dense(places, tokens=TOKENS):
    """Who sees whom [A, T, T], from the tables alone."""
    mask = np.zeros((len(places.prompt_start), tokens, tokens), bool)
    for row, prompt in np.ndindex(*places.prompt_start.shape):
        own = places.prompt_start[row, prompt] + np.arange(places.prompt_length[row, prompt])
        mask[row][np.ix_(own, own)] = np.tri(len(own), dtype=bool)
    share = places.response_start.shape[1] // places.prompt_start.shape[1]
    for row, response in np.ndindex(*places.response_start.shape):
        start, end = places.prompt_start[row, response // share], places.prompt_length[row, response // share]
        prompt = np.arange(start, start + end)
        own = places.response_start[row, response] + np.arange(places.response_length[row, response])
        mask[row][np.ix_(own, own)] = np.tri(len(own), dtype=bool)
        mask[row][np.ix_(own, prompt)] = True
    return mask


def attention(q, k, v, mask):
    """Softmax attention by its definition; 0 at padding, where a token sees nothing."""
    share = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, share, axis=2) for x in (k, v))
    scores = jnp.einsum("atnh,asnh->ants", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("ants,asnh->atnh", jnp.where(mask[:, None], weights, 0), v)


def heads(rng, rows, tokens, query=4, kv=2, size=8):
    return tuple(jnp.asarray(rng.normal(size=(rows, tokens, n, size)), jnp.float32) for n in (query, kv, kv))


@functools.partial(jax.jit, static_argnums=0)
def both(function, arrays, gradient):
    out, pull = jax.vjp(function, *arrays)
    return out, pull(gradient)


def compare(ours, theirs, arrays, rng):
    gradient = jnp.asarray(rng.normal(size=arrays[0].shape), jnp.float32)
    with jax.default_matmul_precision("highest"):
        found, expected = both(ours, arrays, gradient), both(theirs, arrays, gradient)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("responses", [True, False], ids=["with responses", "prompts alone"])
def test_packed_rows_equal_a_dense_mask_in_values_and_gradients(way, seed, responses):
    rng = np.random.default_rng(seed)
    places, (kernels, options) = drawn(rng), WAYS[way]
    longest, places = (LONGEST, places) if responses else (LONGEST | {"response": 0}, alone(places))
    ours = functools.partial(kernels.packed, layout=Packed(places, **longest), **options)
    compare(ours, functools.partial(attention, mask=dense(places)), heads(rng, 2, TOKENS), rng)


@pytest.mark.parametrize("way", WAYS)
def test_images_equal_a_dense_mask_in_values_and_gradients(way):
    rng = np.random.default_rng(0)
    starts = np.array([[0, 100, 180], [0, 0, 0]], np.int32)
    lengths = np.array([[100, 80, 90], [300, 0, 0]], np.int32)
    ids = np.zeros((2, TOKENS), np.int32)
    for row, image in np.ndindex(*starts.shape):
        ids[row, starts[row, image] : starts[row, image] + lengths[row, image]] += image + 1
    mask = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] > 0)
    kernels, options = WAYS[way]
    ours = functools.partial(kernels.segments, starts=starts, lengths=lengths, longest=300, **options)
    compare(ours, functools.partial(attention, mask=mask), heads(rng, 2, TOKENS, kv=4), rng)


@pytest.mark.parametrize("seed", range(2))
def test_segments_given_a_part_at_a_time_are_the_same(monkeypatch, seed):
    """Of groups and of images, in values and gradients; some parts are empty."""
    rng = np.random.default_rng(seed)
    places, arrays = drawn(rng), heads(rng, 2, TOKENS)
    starts, lengths = np.zeros((2, 2, 9), np.int32)
    lengths[0, :4] = 60, 4, 100, 50
    starts[0, :4] = np.cumsum(lengths[0, :4]) - lengths[0, :4]

    def found():
        groups = functools.partial(packed_gpu.packed, layout=Packed(places, **LONGEST), **GPU)
        images = functools.partial(packed_gpu.segments, starts=starts, lengths=lengths, longest=300, **GPU)
        return [both(function, arrays, arrays[0]) for function in (groups, images)]

    with jax.default_matmul_precision("highest"):
        whole = found()
        monkeypatch.setattr(packed_gpu, "_STATISTICS", 1)
        parts = found()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), parts, whole)


def arrays_of(jaxpr):
    """Every array that a program makes."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


@pytest.mark.parametrize("images", [20, 5120, 100_000])
def test_room_for_many_small_images_costs_no_memory(images):
    """cuDNN's statistics are [images, heads, patches] float32, whether the images are there or not."""
    patches, heads = jax.ShapeDtypeStruct((1, 20_480, 16, 80), jnp.bfloat16), 16 * 80 * 20_480 * 4
    table = jax.ShapeDtypeStruct((1, images), jnp.int32)

    def gradient(q, k, v, starts, lengths):
        out, pull = jax.vjp(lambda *x: packed_gpu.segments(*x, starts, lengths, 20_480), q, k, v)
        return pull(out)

    program = jax.make_jaxpr(gradient)(*[patches] * 3, table, table)
    found = list(arrays_of(program.jaxpr))
    calls = [one for one in found if one.ndim == 3 and one.shape[1:] == (16, 20_480) and one.dtype == jnp.float32]
    assert calls and max(4 * one.size for one in calls) <= packed_gpu._STATISTICS
    assert max(one.size * one.dtype.itemsize for one in found if one.dtype == jnp.float32) <= max(heads, 2**28)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_changes_its_own_group_alone(way):
    rng = np.random.default_rng(1)
    places, (kernels, options) = drawn(rng), WAYS[way]
    function = jax.jit(functools.partial(kernels.packed, layout=Packed(places, **LONGEST), **options))
    q, k, v = heads(rng, 2, TOKENS)
    changed = places.prompt_start[0, 1]
    before, after = function(q, k, v), function(q, k.at[0, changed].add(1), v.at[0, changed].add(1))
    moved = np.asarray((before != after).any((2, 3)))
    np.testing.assert_array_equal(moved, dense(places)[:, :, changed] & np.array([[True], [False]]))


@pytest.mark.parametrize("causal, apart", [(True, False), (False, False), (False, True)])
def test_blocks_that_are_visited_are_those_that_hold_something_to_see_and_fit_the_grid(causal, apart):
    rng, block, tokens = np.random.default_rng(3), 16, 256
    for _ in range(20):
        lengths = rng.integers(0, 60, (2, 8))
        ends = np.cumsum(lengths.T.reshape(-1))[1::2]
        ends = ends[ends <= tokens]
        keys, queries = lengths[:, : len(ends)]
        start = ends - keys - queries
        spans = Spans(start + keys, queries, start, keys) if apart else Spans(start, keys, start, keys)
        mask = np.zeros((tokens, tokens), bool)
        for query, query_length, key, key_length in zip(*spans, strict=True):
            mask[query : query + query_length, key : key + key_length] = True
        if causal:
            mask &= np.tri(tokens, dtype=bool)
        blocks = mask.reshape(tokens // block, block, -1, block).any((1, 3))
        found = packed_tpu.seen(Spans(*map(jnp.asarray, spans)), causal, tokens, block)
        np.testing.assert_array_equal(found, blocks)
        longest = Limits(causal, apart, queries=max(spans.query_length), keys=max(spans.key_length))
        for seen, width in zip((blocks, blocks.T), packed_tpu.widths(longest, block), strict=True):
            assert seen.sum(-1).max() <= width
            data, there = packed_tpu.block_map(jnp.asarray(seen), min(width, len(seen)))
            for row, numbers, count in zip(seen, np.asarray(data), np.asarray(there).sum(-1), strict=True):
                np.testing.assert_array_equal(numbers[:count], np.flatnonzero(row))
                assert (numbers[count:] == (numbers[count - 1] if count else 0)).all()


def test_cudnn_is_told_of_segments_no_longer_than_a_piece():
    assert packed_gpu.pieces(16384, 2048) == 8
    assert packed_gpu.pieces(15360, 2048) == 6
    assert packed_gpu.pieces(128 * 113, 2048) == 4
    assert packed_gpu.pieces(100, 100) == 1


@pytest.mark.parametrize(
    "arguments, reason", [((2**14, 32, 128), ""), ((64, 2, 12), "8"), ((2**20, 32, 128), "32-bit")]
)
def test_cudnn_says_what_it_does_not_take(arguments, reason):
    assert reason in packed_gpu.refusal(*arguments)
    assert bool(packed_gpu.refusal(*arguments)) == bool(reason)


def test_cards_before_hopper_are_refused(monkeypatch):
    card = types.SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    assert "need a Hopper card or a newer one, not NVIDIA A100" in packed_gpu.refusal(2**14, 32, 128)
    card.compute_capability = "9.0"
    assert packed_gpu.refusal(2**14, 32, 128) == ""
