"""Log-probs, entropy and their gradients against a plain softmax: blocks, bans, temperature, dtypes, shards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capcur_jax.models.logprobs import Shards, _block_size, ban, token_logprobs

ROOT = Path(__file__).parents[2]
BANNED = (2, 5, 49)
ROWS, LENGTH, WIDTH, VOCABULARY, TEMPERATURE = 4, 3, 6, 50, 0.7
BLOCK = 8  # six blocks of 9, the last moved back by 4; half of the vocabulary: three of 9, moved by 2


def draw(dtype=jnp.float32):
    """h [R, T, D] of flat, peaked and equal distributions, the kernel [D, V], tokens, weights of both results."""
    random = np.random.default_rng(0)
    h = random.standard_normal((ROWS, LENGTH, WIDTH)) * np.array([1.0, 8.0, 0.0])[:, None]
    kernel = random.standard_normal((WIDTH, VOCABULARY))
    allowed = np.setdiff1d(np.arange(VOCABULARY), BANNED)
    tokens = random.permutation(allowed)[: ROWS * LENGTH].reshape(ROWS, LENGTH)
    weights = random.standard_normal((2, ROWS, LENGTH)).astype(np.float32)
    return jnp.asarray(h, dtype), jnp.asarray(kernel, dtype), jnp.asarray(tokens), weights


def plain(h, kernel, tokens, temperature=TEMPERATURE, banned=BANNED):
    """Log-probs and entropy by the textbook, in float32, all logits at once."""
    h, kernel = h.astype(jnp.float32), kernel.astype(jnp.float32)
    allowed = np.setdiff1d(np.arange(kernel.shape[1]), banned)
    table = jax.nn.log_softmax((h @ kernel)[..., allowed] / temperature)
    logprobs = jnp.where(tokens[..., None] == allowed, table, 0).sum(-1)
    return logprobs, -(jnp.exp(table) * table).sum(-1)


def blockwise(h, kernel, tokens, **options):
    options = {"temperature": TEMPERATURE, "banned": BANNED, "block": BLOCK, **options}
    return token_logprobs(h, kernel, tokens, **options)[:2]


def graded(function, weights):
    """The function's two results, and the gradients to h and kernel of their weighted sum."""

    def loss(h, kernel, tokens):
        results = function(h, kernel, tokens)
        return sum((w * r).sum() for w, r in zip(weights, results, strict=True)), results

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def values_and_gradients(h, kernel, tokens):
        (_, results), gradients = run(h, kernel, tokens)
        return results, gradients

    return values_and_gradients


def check(got, expected, gradient: float = 1e-5):
    """Values within 1e-5, gradients within `gradient` of each tensor's largest."""
    for ours, theirs in zip(got[0], expected[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.abs(ours - theirs).max() < gradient * np.abs(theirs).max()


def transposed(results):
    values, (d_h, d_kernel) = results
    return values, (d_h, d_kernel.T)


@pytest.fixture(scope="module")
def expected():
    *arguments, weights = draw()
    return jax.jit(graded(plain, weights))(*arguments)


@pytest.mark.parametrize("block", [BLOCK, VOCABULARY])
@pytest.mark.parametrize("vocabulary_axis", [0, 1])
def test_values_and_gradients_equal_a_plain_softmax(expected, vocabulary_axis, block):
    h, kernel, tokens, weights = draw()

    def ours(*arguments):
        return blockwise(*arguments, vocabulary_axis=vocabulary_axis, block=block)

    run = jax.jit(graded(ours, weights))
    if vocabulary_axis:
        check(run(h, kernel, tokens), expected)
    else:
        check(transposed(run(h, kernel.T, tokens)), expected)


@pytest.mark.parametrize("alone", [0, 1])
def test_each_result_has_its_own_gradient(alone):
    """Without bans, at temperature 1: the defaults."""
    h, kernel, tokens, weights = draw()
    weights[1 - alone] = 0

    def ours(*arguments):
        return token_logprobs(*arguments, block=BLOCK)[:2]

    expected = jax.jit(graded(lambda *arguments: plain(*arguments, 1.0, ()), weights))(h, kernel, tokens)
    check(jax.jit(graded(ours, weights))(h, kernel, tokens), expected)


def test_bfloat16_factors_give_float32_results():
    """As float32 does with the same numbers; gradients are rounded to bfloat16, as their arguments are."""
    h, kernel, tokens, weights = draw(jnp.bfloat16)
    got = jax.jit(graded(blockwise, weights))(h, kernel, tokens)
    assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.float32] * 2 + [jnp.bfloat16] * 2
    check(got, jax.jit(graded(plain, weights))(h, kernel, tokens), gradient=1e-2)

    # Float32 parameters under bfloat16 arithmetic keep a float32 gradient.
    mixed = jax.jit(graded(blockwise, weights))(h, kernel.astype(jnp.float32), tokens)
    assert mixed[1][1].dtype == jnp.float32
    check(mixed, got, gradient=1e-2)


def test_large_logits_lose_nothing():
    """An offset of all logits changes nothing; in float32 it would cancel a careless entropy away."""
    h, kernel, tokens, _ = draw()
    h = jnp.concatenate([h, jnp.ones((ROWS, LENGTH, 1))], axis=-1)
    run, expected = jax.jit(blockwise), jax.jit(plain)(h[..., :-1], kernel, tokens)
    for offset in (-300.0, 300.0):
        moved = jnp.concatenate([kernel, jnp.full((1, VOCABULARY), offset)])
        for got, want in zip(run(h, moved, tokens), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-4)


def test_every_token_has_its_probability_and_banned_ones_have_none():
    h, kernel, _, _ = draw()
    each = jnp.broadcast_to(jnp.arange(VOCABULARY), (ROWS, LENGTH, VOCABULARY))
    h = jnp.broadcast_to(h[:, :, None], (*each.shape, WIDTH))
    got = jax.jit(lambda *x: token_logprobs(*x, banned=BANNED, block=BLOCK))(h, kernel, each)
    assert np.isneginf(got.logprobs[..., list(BANNED)]).all()
    np.testing.assert_allclose(np.exp(got.logprobs).sum(-1), 1, atol=1e-5)
    # The likeliest token is the one that greedy decoding takes; three rows have one, the last has equal logits.
    likeliest = np.asarray(ban(h[:, :, 0] @ kernel, BANNED)).argmax(-1)
    distinct = np.abs(np.asarray(h[:, :, 0])).sum(-1) > 0
    np.testing.assert_array_equal(got.greedy[distinct].sum(-1), 1)
    np.testing.assert_array_equal(got.greedy[distinct].argmax(-1), likeliest[distinct])
    np.testing.assert_array_equal(got.greedy[~distinct], ~np.isin(each, BANNED)[~distinct])
    assert ban(h, ()) is h


def test_a_banned_token_is_a_constant_to_the_gradient():
    """Padding may be a banned token: whatever is made of its -inf, nothing of it reaches the parameters."""
    h, kernel, tokens, weights = draw()
    padded = tokens.at[:, -1].set(BANNED[0])

    def ours(h, kernel, tokens):
        logprobs, entropy = blockwise(h, kernel, tokens)
        return jnp.exp(logprobs - jax.lax.stop_gradient(logprobs)), entropy  # NaN at padding

    weights[1] = 0
    (_, _), gradients = jax.jit(graded(ours, weights))(h, kernel, padded)
    assert not np.asarray(gradients[0])[:, -1].any()
    weights[0, :, -1] = 0
    check(((), gradients), ((), jax.jit(graded(plain, weights))(h, kernel, tokens)[1]))


def test_blocks_fit_the_vocabulary():
    for vocabulary, block in [
        (151_936, 4096),
        (151_936 // 8, 4096),
        (152_064, 2048),
        (VOCABULARY, BLOCK),
        (4096, 4096),
    ]:
        size = _block_size(vocabulary, block)
        count = -(-vocabulary // size)
        assert 0.75 * block < size <= 1.25 * block
        assert count * size < 1.15 * vocabulary
        assert size % 128 == 0 or vocabulary < 128
    assert _block_size(151_936, 4096) * 36 - 151_936 == 128
    assert _block_size(512, 4096) == 512


def variables(jaxpr) -> Iterator[Any]:
    """The shape and dtype of everything that a jaxpr computes, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from variables(inner)


def test_nothing_is_as_large_as_tokens_times_vocabulary():
    """At the size of the 8B model: float32 of a block of logits at most, and of the kernel nothing but its gradient."""
    h = jax.ShapeDtypeStruct((8, 1024, 4096), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((151_936, 4096), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    step = graded(lambda *x: token_logprobs(*x, vocabulary_axis=0, banned=BANNED)[:2], (1.0, 1.0))
    made = list(variables(jax.make_jaxpr(step)(h, kernel, tokens).jaxpr))
    large = {(aval.shape, aval.dtype) for aval in made if aval.size > 8192 * 4224}
    assert large == {(kernel.shape, kernel.dtype)}


# ---------------------------------------------------------------------- shards


def on_eight_devices():
    """Runs in a process of its own. Tokens over data and fsdp, the vocabulary over tensor, D whole or over fsdp."""
    h, kernel, tokens, weights = draw()
    expected = jax.jit(graded(blockwise, weights))(h, kernel, tokens)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rows = P(("data", "fsdp"))
    for spec in (P("fsdp", "tensor"), P("tensor", "fsdp"), P(None, "tensor")):
        axis = spec.index("tensor")
        shards = Shards(mesh, rows, spec)

        def ours(h, kernel, tokens, axis=axis, shards=shards):
            return blockwise(h, kernel, tokens, vocabulary_axis=axis, shards=shards)

        own = kernel if axis else kernel.T
        placed = [
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((h, own, tokens), (rows, spec, rows), strict=True)
        ]
        program = jax.jit(graded(ours, weights)).lower(*placed).compile()
        got = program(*placed)
        assert got[1][1].sharding.is_equivalent_to(placed[1].sharding, 2)
        check(got if axis else transposed(got), expected)

        gathered = re.findall(r"= \S*?\[([\d,]+)\]\S* all-gather", program.as_text())
        assert bool(gathered) == ("fsdp" in spec)
        assert {tuple(map(int, shape.split(","))) for shape in gathered} <= {(WIDTH, 9), (9, WIDTH)}
    print("shards agree")


def test_a_split_vocabulary_gives_the_same_without_being_gathered():
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "tests.models.test_logprobs"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("shards agree\n"), done.stderr


def test_a_layout_that_would_be_wrong_is_refused():
    h, kernel, tokens, _ = draw()
    mesh = jax.make_mesh((1, 1), ("data", "tensor"))
    for spec in (P("tensor", None), P(None, "data")):
        with pytest.raises(ValueError, match="width must be split over axes of the tokens"):
            token_logprobs(h, kernel, tokens, shards=Shards(mesh, P("data"), spec))


if __name__ == "__main__":
    on_eight_devices()
