"""Log-probs and entropy against float64, banned tokens, temperature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capcur_jax.models.logprobs import ban, token_logprobs

BANNED = (2, 5)


def reference(logits: np.ndarray, temperature: float, banned: tuple[int, ...]) -> np.ndarray:
    """Log-probs in float64: the softmax over what is not banned, -inf elsewhere."""
    scaled = logits.astype(np.float64) / temperature
    scaled[..., list(banned)] = -np.inf
    top = scaled.max(-1, keepdims=True)
    return scaled - top - np.log(np.exp(scaled - top).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def logits():
    """A peaked distribution among flat ones, and large offsets that a softmax must not care about."""
    random = np.random.default_rng(0)
    values = random.standard_normal((3, 4, 11)) * np.array([1.0, 8.0, 0.0])[:, None, None]
    return (values + np.array([0.0, 300.0, -300.0])[:, None, None]).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("banned", [(), BANNED])
def test_logprobs_and_entropy_equal_float64(logits, temperature, banned):
    expected = reference(logits, temperature, banned)
    probabilities = np.exp(expected)
    entropy = -np.where(probabilities > 0, probabilities * np.where(probabilities > 0, expected, 0), 0).sum(-1)
    for token in range(logits.shape[-1]):
        got = token_logprobs(jnp.asarray(logits), jnp.full(logits.shape[:-1], token), temperature, banned)
        assert got.logprobs.dtype == got.entropy.dtype == jnp.float32
        np.testing.assert_allclose(got.logprobs, expected[..., token], rtol=1e-5, atol=2e-4)
        np.testing.assert_allclose(got.entropy, entropy, atol=1e-4)


def test_banned_tokens_have_no_probability_and_leave_the_rest_a_distribution(logits):
    each = jnp.broadcast_to(jnp.arange(11), (3, 4, 11))
    got = token_logprobs(jnp.asarray(logits)[:, :, None], each, banned=BANNED).logprobs
    assert np.isneginf(got[..., list(BANNED)]).all()
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, atol=1e-4)
    assert (ban(jnp.asarray(logits), ()) == logits).all()


@pytest.mark.parametrize("value", ["logprobs", "entropy"])
def test_gradients_with_banned_tokens_are_finite_and_right(logits, value):
    """Against differences of the float64 reference; nothing flows to a banned logit, and no 0 x -inf turns up."""
    tokens = np.array([0, 1, 3, 10])
    weights = np.random.default_rng(1).standard_normal(logits.shape[:-1])

    def ours(x):
        return (getattr(token_logprobs(x, jnp.broadcast_to(tokens, x.shape[:-1]), 0.7, BANNED), value) * weights).sum()

    def exact(x):
        logprobs = reference(x, 0.7, BANNED)
        if value == "logprobs":
            return (logprobs[:, np.arange(4), tokens] * weights).sum()
        return -(np.exp(logprobs) * np.where(np.isneginf(logprobs), 0, logprobs)).sum(-1).ravel() @ weights.ravel()

    gradient = np.asarray(jax.grad(ours)(jnp.asarray(logits)))
    assert np.isfinite(gradient).all()
    assert not gradient[..., list(BANNED)].any()
    step, expected = 1e-5, np.zeros(logits.shape)
    for index in np.ndindex(logits.shape):
        up, down = logits.astype(np.float64), logits.astype(np.float64)
        up[index] += step
        down[index] -= step
        expected[index] = (exact(up) - exact(down)) / (2 * step)
    np.testing.assert_allclose(gradient, expected, atol=1e-3)


def test_temperature_divides_the_logits(logits):
    tokens = jnp.zeros(logits.shape[:-1], jnp.int32)
    hot, divided = token_logprobs(jnp.asarray(logits), tokens, 2.0), token_logprobs(jnp.asarray(logits) / 2, tokens)
    jax.tree.map(np.testing.assert_array_equal, hot, divided)


def test_bfloat16_logits_are_taken_as_float32(logits):
    """The softmax is float32 whatever comes in."""
    half = jnp.asarray(logits, jnp.bfloat16)
    tokens = jnp.ones(logits.shape[:-1], jnp.int32)
    jax.tree.map(
        np.testing.assert_array_equal,
        token_logprobs(half, tokens, 0.9),
        token_logprobs(half.astype(jnp.float32), tokens, 0.9),
    )
