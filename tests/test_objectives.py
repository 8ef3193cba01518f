"""Advantages and losses against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capcur_jax import objectives

advantages = jax.jit(objectives.group_advantages)

# ---------------------------------------------------------------------- advantages


def test_advantages_use_the_sample_standard_deviation():
    # One right answer of five: mean 0.2, variance (0.8^2 + 4 x 0.2^2) / 4 = 0.2. Of 0, 1 the sample std is 0.5^0.5.
    got = advantages(jnp.array([[1.0, 0, 0, 0, 0], [1, 2, 3, 4, 5]]))
    by_hand = [[0.8 / 0.2**0.5] + [-0.2 / 0.2**0.5] * 4, np.array([-2, -1, 0, 1, 2]) / 2.5**0.5]
    np.testing.assert_allclose(got, by_hand, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(advantages(jnp.array([[0.0, 1.0]])), [[-(0.5**0.5), 0.5**0.5]], rtol=1e-5)


def test_epsilon_is_added_to_the_standard_deviation():
    got = objectives.group_advantages(jnp.array([[0.0, 1.0, 2.0]]), epsilon=1.0)
    np.testing.assert_allclose(got, [[-0.5, 0.0, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("reward", [0.9, 0.1, 1.0, 0.0, 1 / 3])
def test_equal_rewards_have_advantage_exactly_zero_in_float32(reward):
    # The float32 mean of five times 0.9 is not 0.9: without a guard |A| would be 0.056.
    got = np.asarray(advantages(np.full((3, 5), reward, np.float32)))
    assert (got == 0).all()


def test_a_group_is_normalised_by_itself():
    rewards = np.random.default_rng(0).random((4, 5)).astype(np.float32)
    together = np.asarray(advantages(rewards))
    for row, alone in zip(rewards, together, strict=True):
        np.testing.assert_array_equal(advantages(row[None])[0], alone)
    np.testing.assert_allclose(together.sum(1), 0, atol=1e-5)
    np.testing.assert_allclose(together.std(1, ddof=1), 1, rtol=1e-4)


def test_a_group_of_one_is_an_error_that_names_the_key():
    with pytest.raises(ValueError, match=r"config\.rollout\.group"):
        objectives.group_advantages(jnp.ones((4, 1)))


# ---------------------------------------------------------------------- policy loss

# ratio, advantage -> loss, clipped, d loss / d log-prob; bounds 0.8 and 1.3, dual clip 3.
BRANCHES = {
    "at one": (1.0, 2.0, -2.0, False, -2.0),
    "inside, good": (1.25, 2.0, -2.5, False, -2.5),
    "above, good": (1.5, 2.0, -2.6, True, 0.0),
    "far above, good": (40.0, 2.0, -2.6, True, 0.0),
    "below, good": (0.5, 2.0, -1.0, False, -1.0),
    "inside, bad": (0.9, -2.0, 1.8, False, 1.8),
    "below, bad": (0.5, -2.0, 1.6, True, 0.0),
    "above, bad": (1.5, -2.0, 3.0, False, 3.0),
    "dual clip": (4.0, -2.0, 6.0, True, 0.0),
    "no advantage": (4.0, 0.0, 0.0, False, 0.0),
}


def _policy(ratio, advantage, **bounds):
    """Loss, clipped and gradient of one token whose old log-prob is -1.5."""
    old = jnp.full((1, 1), -1.5)

    def loss(logprobs):
        terms = objectives.policy_loss(logprobs, old, jnp.array([advantage]), **bounds)
        return terms.loss[0, 0], terms.clipped[0, 0]

    (value, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(old + jnp.log(ratio))
    return float(value), bool(clipped), float(gradient[0, 0])


@pytest.mark.parametrize("branch", BRANCHES)
def test_every_branch_of_the_policy_loss(branch):
    ratio, advantage, loss, clipped, gradient = BRANCHES[branch]
    assert _policy(ratio, advantage) == (pytest.approx(loss, rel=1e-5), clipped, pytest.approx(gradient, rel=1e-5))


def test_the_bounds_are_arguments():
    bounds = {"clip_low": 0.1, "clip_high": 0.5, "clip_dual": 2.0}
    assert _policy(1.4, 1.0, **bounds) == (pytest.approx(-1.4), False, pytest.approx(-1.4))
    assert _policy(1.6, 1.0, **bounds) == (pytest.approx(-1.5), True, 0.0)
    assert _policy(0.85, -1.0, **bounds) == (pytest.approx(0.9), True, 0.0)
    assert _policy(2.5, -1.0, **bounds) == (pytest.approx(2.0), True, 0.0)


def test_a_row_s_advantage_goes_to_all_of_its_tokens():
    terms = objectives.policy_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.array([1.0, -2.0]))
    np.testing.assert_array_equal(terms.loss, [[-1] * 3, [2] * 3])


def test_first_update_has_ratio_exactly_one_and_the_policy_gradient():
    logprobs = jnp.asarray(-np.random.default_rng(1).exponential(3, (4, 7)), jnp.float32)
    advantage = jnp.array([0.3, -1.7, 0.0, 1.1])

    @jax.jit
    def run(logprobs):
        def loss(x):
            terms = objectives.policy_loss(x, jax.lax.stop_gradient(x), advantage)
            return terms.loss.sum(), terms

        return jax.grad(loss, has_aux=True)(logprobs)

    gradient, terms = run(logprobs)
    assert (np.asarray(terms.ratio) == 1).all() and not np.asarray(terms.clipped).any()
    np.testing.assert_array_equal(gradient, np.broadcast_to(-np.asarray(advantage)[:, None], (4, 7)))


@pytest.mark.parametrize("difference", [-500.0, 500.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_runaway_log_ratio_stays_finite(difference, advantage):
    def loss(x):
        return objectives.policy_loss(x, jnp.zeros((1, 1)), jnp.array([advantage])).loss.sum()

    value, gradient = jax.value_and_grad(loss)(jnp.full((1, 1), difference))
    assert np.isfinite(value) and np.isfinite(gradient).all()


# ---------------------------------------------------------------------- KL


def test_k3_by_hand_and_its_clamp():
    differences = np.array([0.0, np.log(2), -np.log(2), 2.0, 5.0, -9.0, -15.0, 300.0, -300.0])  # reference - policy
    by_hand = [0.0, 1 - np.log(2), np.log(2) - 0.5, np.e**2 - 3, 10, np.exp(-9) + 8, 10, 10, 10]
    got = objectives.k3_divergence(jnp.full((1, 9), -1.0), jnp.asarray(differences[None] - 1.0, jnp.float32))
    np.testing.assert_allclose(got[0], by_hand, rtol=1e-5, atol=1e-7)


def test_k3_of_the_same_policy_is_exactly_zero_with_gradient_zero():
    logprobs = jnp.asarray(-np.random.default_rng(2).exponential(3, (3, 50)), jnp.float32)
    value, gradient = jax.value_and_grad(lambda x: objectives.k3_divergence(x, logprobs).sum())(logprobs)
    assert value == 0 and (np.asarray(gradient) == 0).all()


def test_gradient_of_k3_as_a_loss_and_none_where_clamped():
    differences = jnp.array([[0.0, 0.5, -0.5, 2.0, 5.0, -15.0, 40.0]])
    gradient = jax.grad(lambda x: objectives.k3_divergence(x, differences).sum())(jnp.zeros((1, 7)))
    by_hand = [0, 1 - np.exp(0.5), 1 - np.exp(-0.5), 1 - np.exp(2), 0, 0, 0]
    np.testing.assert_allclose(gradient[0], by_hand, rtol=1e-5, atol=1e-7)


def test_k3_has_the_right_value_and_a_biased_gradient_as_a_loss():
    """Its mean over the policy is KL(policy || reference). The mean of its gradient, with the samples held fixed as a
    trainer holds them, is that of the other divergence, KL(reference || policy) (TRL #4638)."""
    random = np.random.default_rng(3)
    logits = jnp.asarray(random.normal(size=6) / 2, jnp.float32)
    reference = jax.nn.log_softmax(jnp.asarray(random.normal(size=6) / 2, jnp.float32))

    def kl(p, q):
        return jnp.sum(jnp.exp(p) * (p - q))

    policy = jax.nn.softmax(logits)

    def mean_k3(logits):
        return jnp.sum(policy * objectives.k3_divergence(jax.nn.log_softmax(logits)[None], reference[None])[0])

    np.testing.assert_allclose(mean_k3(logits), kl(jax.nn.log_softmax(logits), reference), rtol=1e-5)
    gradient = jax.grad(mean_k3)(logits)
    forward = jax.grad(lambda x: kl(reference, jax.nn.log_softmax(x)))(logits)
    reverse = jax.grad(lambda x: kl(jax.nn.log_softmax(x), reference))(logits)
    np.testing.assert_allclose(gradient, forward, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient - reverse).max() > 0.01


# ---------------------------------------------------------------------- means over tokens


def test_token_mean_weighs_tokens_not_rows():
    values = jnp.array([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    mask = objectives.response_mask(jnp.array([2, 1]), 3)
    assert float(objectives.token_mean(values, mask)) == 3.0  # (1 + 2 + 6) / 3, not (1.5 + 6) / 2


def test_parts_divided_by_the_tokens_of_the_whole_mini_batch_add_up():
    random = np.random.default_rng(4)
    values = jnp.asarray(random.normal(size=(8, 6)), jnp.float32)
    mask = objectives.response_mask(jnp.array([6, 1, 3, 5, 2, 2, 6, 4]), 6)
    whole = jax.value_and_grad(objectives.token_mean)(values, mask)
    for size in (1, 2, 4):
        parts = [
            jax.value_and_grad(objectives.token_mean)(values[at : at + size], mask[at : at + size], mask.sum())
            for at in range(0, 8, size)
        ]
        np.testing.assert_allclose(sum(value for value, _ in parts), whole[0], rtol=1e-6)
        np.testing.assert_allclose(np.concatenate([gradient for _, gradient in parts]), whole[1], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_masked_values_do_not_leak(value):
    values = jnp.array([[1.0, 3.0, value], [value, value, value]])
    mask = objectives.response_mask(jnp.array([2, 0]), 3)
    mean, gradient = jax.value_and_grad(objectives.token_mean)(values, mask)
    assert float(mean) == 2.0
    np.testing.assert_array_equal(gradient, [[0.5, 0.5, 0], [0, 0, 0]])


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_log_probs_of_padding_do_not_leak_through_the_losses(value):
    mask = objectives.response_mask(jnp.array([2]), 3)
    other = jnp.array([[-1.0, -2.0, value]])

    def loss(logprobs):
        policy = objectives.policy_loss(logprobs, other, jnp.array([1.0])).loss
        return objectives.token_mean(policy + objectives.k3_divergence(logprobs, other), mask)

    mean, gradient = jax.value_and_grad(loss)(jnp.array([[-1.0, -2.0, -3.0]]))
    assert float(mean) == -1.0
    np.testing.assert_array_equal(gradient, [[-0.5, -0.5, 0]])


def test_no_token_at_all_is_zero_not_nan():
    values = jnp.full((2, 3), jnp.nan)
    assert float(objectives.token_mean(values, jnp.zeros((2, 3), bool))) == 0.0


def test_the_mask_comes_from_lengths():
    mask = objectives.response_mask(jnp.array([0, 2, 4]), 4)
    np.testing.assert_array_equal(mask, [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
