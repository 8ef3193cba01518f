"""Advantages, losses and weights against numbers worked out by hand, plain float64 loops and torch's autograd."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from capcur_jax.errors import InputError
from capcur_jax.learner import objectives
from capcur_jax.schedule import Stage

advantages = jax.jit(objectives.group_advantages, static_argnames="normalise")

# ---------------------------------------------------------------------- advantages


def test_advantages_use_the_sample_standard_deviation():
    # One right answer of five: mean 0.2, variance (0.8^2 + 4 x 0.2^2) / 4 = 0.2. Of 0, 1 the sample std is 0.5^0.5.
    got = advantages(jnp.array([[1.0, 0, 0, 0, 0], [1, 2, 3, 4, 5]]))
    by_hand = [[0.8 / 0.2**0.5] + [-0.2 / 0.2**0.5] * 4, np.array([-2, -1, 0, 1, 2]) / 2.5**0.5]
    np.testing.assert_allclose(got, by_hand, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(advantages(jnp.array([[0.0, 1.0]])), [[-(0.5**0.5), 0.5**0.5]], rtol=1e-5)


def test_without_the_std_an_advantage_is_the_distance_from_the_mean():
    got = advantages(jnp.array([[1.0, 0, 0, 0, 0], [1, 2, 3, 4, 5]]), normalise=False)
    np.testing.assert_allclose(got, [[0.8, -0.2, -0.2, -0.2, -0.2], [-2, -1, 0, 1, 2]], rtol=1e-6)


def test_epsilon_is_added_to_the_standard_deviation():
    got = objectives.group_advantages(jnp.array([[0.0, 1.0, 2.0]]), epsilon=1.0)
    np.testing.assert_allclose(got, [[-0.5, 0.0, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("reward", [0.9, 0.1, 1.0, 0.0, 1 / 3])
def test_equal_rewards_have_advantage_exactly_zero_in_float32(reward, normalise):
    # The float32 mean of five times 0.9 is not 0.9: without a guard |A| would be 0.056.
    got = np.asarray(advantages(np.full((3, 5), reward, np.float32), normalise=normalise))
    assert (got == 0).all()


def test_a_group_is_normalised_by_itself():
    rewards = np.random.default_rng(0).random((4, 5)).astype(np.float32)
    together = np.asarray(advantages(rewards))
    for row, alone in zip(rewards, together, strict=True):
        np.testing.assert_array_equal(advantages(row[None])[0], alone)
    np.testing.assert_allclose(together.sum(1), 0, atol=1e-5)
    np.testing.assert_allclose(together.std(1, ddof=1), 1, rtol=1e-4)


def test_a_group_of_one_is_an_error_that_names_the_key():
    with pytest.raises(InputError, match=r"config\.rollout\.group"):
        objectives.group_advantages(jnp.ones((4, 1)))


# ---------------------------------------------------------------------- policy loss

# ratio, advantage -> loss, which clip binds, d loss / d log-prob; bounds 0.8 and 1.3, dual clip 3.
BRANCHES = {
    "at one": (1.0, 2.0, -2.0, "", -2.0),
    "inside, good": (1.25, 2.0, -2.5, "", -2.5),
    "above, good": (1.5, 2.0, -2.6, "high", 0.0),
    "far above, good": (40.0, 2.0, -2.6, "high", 0.0),
    "below, good": (0.5, 2.0, -1.0, "", -1.0),
    "inside, bad": (0.9, -2.0, 1.8, "", 1.8),
    "below, bad": (0.5, -2.0, 1.6, "low", 0.0),
    "above, bad": (1.5, -2.0, 3.0, "", 3.0),
    "dual clip": (4.0, -2.0, 6.0, "dual", 0.0),
    "no advantage": (4.0, 0.0, 0.0, "", 0.0),
}


def _policy(ratio, advantage, **options):
    """Loss, clip and gradient of one token whose old log-prob is -1.5."""
    old, mask = jnp.full((1, 1), -1.5), jnp.ones((1, 1), bool)

    def loss(logprobs):
        terms = objectives.policy_terms(logprobs, old, jnp.array([advantage]), mask, **options)
        return terms.loss[0, 0], terms

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(old + jnp.log(ratio))
    clips = {"low": terms.clipped_low, "high": terms.clipped_high, "dual": terms.clipped_dual}
    return float(value), "".join(name for name, clipped in clips.items() if clipped[0, 0]), float(gradient[0, 0])


@pytest.mark.parametrize("level", objectives.RATIO_LEVELS)  # the mean over one token is that token
@pytest.mark.parametrize("branch", BRANCHES)
def test_every_branch_of_the_policy_loss(branch, level):
    ratio, advantage, loss, clipped, gradient = BRANCHES[branch]
    got = _policy(ratio, advantage, level=level)
    assert got == (pytest.approx(loss, rel=1e-5), clipped, pytest.approx(gradient, rel=1e-5))


def test_the_bounds_are_arguments():
    bounds = {"clip_low": 0.1, "clip_high": 0.5, "clip_dual": 2.0}
    assert _policy(1.4, 1.0, **bounds) == (pytest.approx(-1.4), "", pytest.approx(-1.4))
    assert _policy(1.6, 1.0, **bounds) == (pytest.approx(-1.5), "high", 0.0)
    assert _policy(0.85, -1.0, **bounds) == (pytest.approx(0.9), "low", 0.0)
    assert _policy(2.5, -1.0, **bounds) == (pytest.approx(2.0), "dual", 0.0)


def test_no_dual_clip():
    assert _policy(40.0, -2.0, clip_dual=0) == (pytest.approx(80.0, rel=1e-5), "", pytest.approx(80.0, rel=1e-5))


@pytest.mark.parametrize("clip_dual", [-1.0, 0.5, 1.0])
def test_a_dual_clip_that_would_bind_at_ratio_one_is_an_error(clip_dual):
    with pytest.raises(InputError, match=r"config\.objective\.clip_dual"):
        _policy(1.0, -1.0, clip_dual=clip_dual)


@pytest.mark.parametrize("name", ["geometric", "", "Token"])
def test_an_unknown_option_is_an_error_that_lists_the_others(name):
    x, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    totals = {"total_tokens": 1, "total_rows": 1, "constant_length": 1}
    with pytest.raises(InputError, match="token, sequence"):
        objectives.policy_terms(x, x, x[0], mask, level=name)
    with pytest.raises(InputError, match="token, sequence"):
        objectives.importance_weights(x, x, mask, mode="mask", cap=2.0, level=name)
    with pytest.raises(InputError, match="none, truncate, mask"):
        objectives.importance_weights(x, x, mask, mode=name, cap=2.0)
    with pytest.raises(InputError, match="k1, k2, k3, k3_unbiased, none"):
        objectives.divergence(name, x, x, x)
    with pytest.raises(InputError, match="token, sequence, constant"):
        objectives.row_weights(np.array([1]), np.array([True]), name, **totals)


def _batch(seed, rows=6, length=7, spread=0.4):
    """Log-probs, old ones, advantages and a mask with rows of every length from 0 up."""
    random = np.random.default_rng(seed)
    old = -random.exponential(2, (rows, length))
    new = old + spread * (random.normal(size=(rows, length)) + random.normal(size=(rows, 1)))
    lengths = np.arange(rows) % (length + 1)
    return new, old, random.normal(size=rows), np.arange(length)[None] < lengths[:, None]


def _torch_policy(new, old, advantage, mask, low, high, dual, level):
    """Loss and gradient of PPO as it is written in the papers, with max and min, in float64; plain loops over rows."""
    new = torch.tensor(new, requires_grad=True)
    losses = torch.zeros(new.shape, dtype=torch.float64)
    for row, length in enumerate(mask.sum(1)):
        for at in range(length):
            if level == "token":
                ratio = torch.exp(new[row, at] - old[row, at])
            else:
                ratio = torch.exp((new[row, :length] - torch.tensor(old[row, :length])).sum() / length)
            products = torch.stack([-advantage[row] * ratio, -advantage[row] * torch.clamp(ratio, 1 - low, 1 + high)])
            loss = products.max()
            if advantage[row] < 0 and dual:
                loss = torch.minimum(loss, torch.tensor(-advantage[row] * dual))
            losses[row, at] = loss
    weight = 1 + np.arange(new.shape[0])  # rows that weigh unequally, so that no gradient lands in another row unseen
    (losses.sum(1) * torch.tensor(weight)).sum().backward()
    return losses.detach().numpy(), new.grad.numpy(), weight


@pytest.mark.parametrize("level", objectives.RATIO_LEVELS)
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.3, 3.0), (0.1, 0.5, 0), (3e-4, 4e-4, 1.2)])
def test_policy_loss_and_gradient_against_torch(level, low, high, dual):
    new, old, advantage, mask = _batch(1, rows=40)
    losses, gradient, weight = _torch_policy(new, old, advantage, mask, low, high, dual, level)

    @jax.jit
    def run(new):
        def loss(new):
            bounds = {"clip_low": low, "clip_high": high, "clip_dual": dual}
            arrays = (jnp.asarray(x, jnp.float32) for x in (old, advantage))
            terms = objectives.policy_terms(new, *arrays, jnp.asarray(mask), level=level, **bounds)
            return (objectives.masked_sum(terms.loss, jnp.asarray(mask)) * weight).sum(), terms

        return jax.grad(loss, has_aux=True)(new)

    got, terms = run(jnp.asarray(new, jnp.float32))
    np.testing.assert_allclose(terms.loss, losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-5)
    assert np.abs(gradient).max() > 0.1  # something was left unclipped
    assert np.asarray(terms.clipped_low).any() and np.asarray(terms.clipped_high).any()


def test_gspo_shares_the_geometric_mean_of_a_row():
    # Row 1: log-ratios 0.3, -0.1, 0.1, mean 0.1; row 2: its only token's 0.2; row 3 has none.
    new = jnp.array([[-0.7, -1.1, -0.9, 5.0], [-0.8, 9.0, 9.0, 9.0], [7.0, 7.0, 7.0, 7.0]])
    mask = objectives.response_mask(jnp.array([3, 1, 0]), 4)
    with jax.debug_nans(True):  # nor is there a NaN on the way, of the row without tokens
        terms = objectives.policy_terms(new, jnp.full((3, 4), -1.0), jnp.array([2.0, 1.0, 1.0]), mask, level="sequence")
    first, second = np.exp(0.1), np.exp(0.2)
    np.testing.assert_allclose(terms.ratio, [[first] * 3 + [1], [second, 1, 1, 1], [1] * 4], rtol=1e-6)
    np.testing.assert_allclose(terms.loss, [[-2 * first] * 3 + [0], [-second, 0, 0, 0], [0] * 4], rtol=1e-6)


def test_gspo_by_sequences_has_the_papers_gradient():
    """d/d log-prob of -s A, a mean over the row: -s A / length for each of its tokens."""
    new, old, advantage, mask = _batch(2, spread=0.01)
    lengths = mask.sum(1)
    weights = objectives.row_weights(lengths, lengths >= 0, "sequence", total_tokens=0, total_rows=6, constant_length=1)

    def loss(new):
        arrays = (jnp.asarray(x, jnp.float32) for x in (old, advantage))
        terms = objectives.policy_terms(new, *arrays, jnp.asarray(mask), level="sequence")
        return (objectives.masked_sum(terms.loss, jnp.asarray(mask)) * weights).sum()

    got = jax.grad(loss)(jnp.asarray(new, jnp.float32))
    for row, length in enumerate(lengths):
        ratio = np.exp((new - old)[row, :length].mean()) if length else 0.0
        by_hand = -ratio * advantage[row] / max(length, 1) / 6 * mask[row]
        np.testing.assert_allclose(got[row], by_hand, rtol=1e-4, atol=1e-7)


def test_a_row_s_advantage_goes_to_all_of_its_tokens():
    x = jnp.zeros((2, 3))
    terms = objectives.policy_terms(x, x, jnp.array([1.0, -2.0]), jnp.ones((2, 3), bool))
    np.testing.assert_array_equal(terms.loss, [[-1] * 3, [2] * 3])


@pytest.mark.parametrize(("level", "share"), [("token", 1), ("sequence", 7)])
def test_first_update_has_ratio_exactly_one_and_the_policy_gradient(level, share):
    logprobs = jnp.asarray(-np.random.default_rng(1).exponential(3, (4, 7)), jnp.float32)
    advantage = jnp.array([0.3, -1.7, 0.0, 1.1])

    @jax.jit
    def run(logprobs):
        def loss(x):  # the policy's own log-probs are the old ones, and need no stop_gradient of the caller's
            terms = objectives.policy_terms(x, x, advantage, jnp.ones((4, 7), bool), level=level)
            return terms.loss.sum() if level == "token" else terms.loss.mean(1).sum(), terms

        return jax.grad(loss, has_aux=True)(logprobs)

    gradient, terms = run(logprobs)
    assert (np.asarray(terms.ratio) == 1).all()
    assert not any(np.asarray(x).any() for x in (terms.clipped_low, terms.clipped_high, terms.clipped_dual))
    by_hand = np.broadcast_to(-np.asarray(advantage)[:, None] / share, (4, 7))
    np.testing.assert_allclose(gradient, by_hand, rtol=0 if level == "token" else 1e-6)


@pytest.mark.parametrize("level", objectives.RATIO_LEVELS)
@pytest.mark.parametrize("difference", [-500.0, 500.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_a_runaway_log_ratio_stays_finite(difference, advantage, level):
    def loss(x):
        mask = jnp.ones((1, 1), bool)
        return objectives.policy_terms(x, x * 0, jnp.array([advantage]), mask, clip_dual=0, level=level).loss.sum()

    value, gradient = jax.value_and_grad(loss)(jnp.full((1, 1), difference))
    assert np.isfinite(value) and np.isfinite(gradient).all()


# ---------------------------------------------------------------------- KL


def _kl(estimator, *logprobs):
    return objectives.divergence(estimator, *(jnp.asarray(x, jnp.float32)[None] for x in logprobs))[0]


def test_k3_by_hand_and_its_clamp():
    differences = np.array([0.0, np.log(2), -np.log(2), 2.0, 5.0, -9.0, -15.0, 300.0, -300.0])  # reference - policy
    by_hand = [0.0, 1 - np.log(2), np.log(2) - 0.5, np.e**2 - 3, 10, np.exp(-9) + 8, 10, 10, 10]
    got = _kl("k3", np.full(9, -1.0), differences - 1.0)
    np.testing.assert_allclose(got, by_hand, rtol=1e-5, atol=1e-7)


def test_the_other_estimators_by_hand():
    policy, reference, old = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5], [-1.0, -2.5, -1.5]
    np.testing.assert_allclose(_kl("k1", policy, reference), [0.5, -1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(_kl("k2", policy, reference), [0.125, 0.5, 0.0], rtol=1e-6)
    by_hand = [np.exp(-0.5) + 0.5 - 1, np.exp(0.5) * (np.exp(1.0) - 1.0 - 1), 0.0]
    np.testing.assert_allclose(_kl("k3_unbiased", policy, reference, old), by_hand, rtol=1e-5)
    np.testing.assert_array_equal(objectives.divergence("none", jnp.ones((2, 3)), None), np.zeros((2, 3)))


@pytest.mark.parametrize("estimator", objectives.KL_ESTIMATORS)
def test_the_divergence_from_itself_is_exactly_zero_and_has_no_gradient_but_k1_s(estimator):
    logprobs = jnp.asarray(-np.random.default_rng(2).exponential(3, (3, 50)), jnp.float32)

    def total(x):
        return objectives.divergence(estimator, x, logprobs, logprobs).sum()

    value, gradient = jax.value_and_grad(total)(logprobs)
    assert value == 0 and (np.asarray(gradient) == (estimator == "k1")).all()


@pytest.mark.parametrize("estimator", objectives.KL_ESTIMATORS)
def test_neither_the_reference_nor_the_old_policy_gets_a_gradient(estimator):
    def total(others):
        return objectives.divergence(estimator, jnp.full((1, 2), -1.0), *others).sum()

    for gradient in jax.grad(total)((jnp.array([[-2.0, -0.5]]), jnp.array([[-1.5, -0.8]]))):
        assert (np.asarray(gradient) == 0).all()


def test_gradient_of_k3_as_a_loss_and_none_where_clamped():
    differences = jnp.array([[0.0, 0.5, -0.5, 2.0, 5.0, -15.0, 40.0]])
    gradient = jax.grad(lambda x: objectives.divergence("k3", x, differences).sum())(jnp.zeros((1, 7)))
    by_hand = [0, 1 - np.exp(0.5), 1 - np.exp(-0.5), 1 - np.exp(2), 0, 0, 0]
    np.testing.assert_allclose(gradient[0], by_hand, rtol=1e-5, atol=1e-7)


def _exact(estimator, on_policy):
    """Mean value and mean gradient of an estimator over all tokens of a small vocabulary, sampled from the old policy,
    beside KL(policy || reference), its gradient, and the gradient of KL(reference || policy) (torch, float64)."""
    random = np.random.default_rng(3)
    logits, shift, reference = (random.normal(size=6) / 2 for _ in range(3))
    reference = torch.log_softmax(torch.tensor(reference), 0)
    old = torch.log_softmax(torch.tensor(logits if on_policy else logits + shift), 0)

    def mean(logits):  # the tokens are held fixed: their frequencies aren't differentiated
        arrays = (jnp.asarray(x.numpy(), jnp.float32)[None] for x in (reference, old))
        tokens = objectives.divergence(estimator, jax.nn.log_softmax(logits)[None], *arrays)[0]
        return jnp.sum(jnp.exp(jnp.asarray(old.numpy(), jnp.float32)) * tokens)

    value, gradient = jax.value_and_grad(mean)(jnp.asarray(logits, jnp.float32))

    def truth(forward):
        x = torch.tensor(logits, requires_grad=True)
        p, q = (reference, torch.log_softmax(x, 0)) if forward else (torch.log_softmax(x, 0), reference)
        kl = (torch.exp(p) * (p - q)).sum()
        kl.backward()
        return kl.item(), x.grad.numpy()

    return (float(value), np.asarray(gradient)), truth(forward=False), truth(forward=True)


@pytest.mark.parametrize("on_policy", [True, False])
def test_k3_unbiased_has_the_value_and_the_gradient_of_the_kl_on_and_off_policy(on_policy):
    (value, gradient), (kl, reverse), _ = _exact("k3_unbiased", on_policy)
    assert value == pytest.approx(kl, rel=1e-5)
    np.testing.assert_allclose(gradient, reverse, rtol=1e-4, atol=1e-6)


def test_k3_has_the_right_value_and_as_a_loss_the_gradient_of_the_other_divergence():
    """TRL #4638: the mean of its gradient is that of KL(reference || policy)."""
    (value, gradient), (kl, reverse), (_, forward) = _exact("k3", on_policy=True)
    assert value == pytest.approx(kl, rel=1e-5)
    np.testing.assert_allclose(gradient, forward, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient - reverse).max() > 0.01


def test_k2_has_another_value_and_as_a_loss_the_gradient_of_the_kl_on_policy():
    (value, gradient), (kl, reverse), _ = _exact("k2", on_policy=True)
    assert abs(value - kl) > 0.001
    np.testing.assert_allclose(gradient, reverse, rtol=1e-4, atol=1e-6)
    (_, gradient), (_, reverse), _ = _exact("k2", on_policy=False)
    assert np.abs(gradient - reverse).max() > 0.01


def test_k1_has_the_right_value_and_as_a_loss_no_gradient_on_policy():
    (value, gradient), (kl, reverse), _ = _exact("k1", on_policy=True)
    assert value == pytest.approx(kl, rel=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert np.abs(reverse).max() > 0.01


# ---------------------------------------------------------------------- between sampler and trainer

# old / sampler of three rows with 3, 2 and 0 tokens; 9 is padding.
RATIOS = np.array([[1.0, 3.0, 0.25], [0.4, 1.5, 9.0], [9.0, 9.0, 9.0]])
LENGTHS = np.array([3, 2, 0])
CORRECTED = {
    ("none", "token"): [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
    ("none", "sequence"): [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
    ("truncate", "token"): [[1, 2, 0.25], [0.4, 1.5, 1], [1, 1, 1]],
    ("mask", "token"): [[1, 0, 0], [0, 1.5, 1], [1, 1, 1]],
    ("truncate", "sequence"): [[0.75] * 3, [0.6, 0.6, 1], [1, 1, 1]],  # 1 x 3 x 0.25; 0.4 x 1.5
    ("mask", "sequence"): [[0.75] * 3, [0.6, 0.6, 1], [1, 1, 1]],
}


def _weights(ratios, **options):
    mask = objectives.response_mask(jnp.asarray(LENGTHS), 3)
    old = jnp.full((3, 3), -1.5)
    return objectives.importance_weights(old, old - jnp.log(jnp.asarray(ratios, jnp.float32)), mask, **options)


@pytest.mark.parametrize(("mode", "level"), CORRECTED)
def test_importance_weights_by_hand(mode, level):
    got = _weights(RATIOS, mode=mode, cap=2.0, level=level)
    np.testing.assert_allclose(got, CORRECTED[mode, level], rtol=1e-5)


def test_a_row_s_product_is_cut_at_the_cap_too():
    ratios = [[1.5, 1.5, 1.5], [0.6, 0.6, 9.0], [9.0] * 3]  # products 3.375 and 0.36
    truncated = _weights(ratios, mode="truncate", cap=2.0, level="sequence")
    np.testing.assert_allclose(truncated, [[2, 2, 2], [0.36, 0.36, 1], [1, 1, 1]], rtol=1e-5)
    masked = _weights(ratios, mode="mask", cap=2.0, level="sequence")
    np.testing.assert_array_equal(masked, [[0, 0, 0], [0, 0, 1], [1, 1, 1]])


def test_a_runaway_product_stays_finite():
    old, mask = jnp.zeros((2, 2000)), jnp.ones((2, 2000), bool)
    sampler = jnp.stack([jnp.full(2000, -5.0), jnp.full(2000, 5.0)])
    got = objectives.importance_weights(old, sampler, mask, mode="truncate", cap=1e30, level="sequence")
    np.testing.assert_allclose(got[:, 0], [np.exp(20), np.exp(-20)], rtol=1e-5)


def test_the_same_policy_weighs_exactly_one():
    x, mask = jnp.asarray(-np.random.default_rng(5).exponential(3, (3, 9)), jnp.float32), jnp.ones((3, 9), bool)
    for mode, level in itertools.product(objectives.SAMPLER_CORRECTIONS, objectives.RATIO_LEVELS):
        assert (np.asarray(objectives.importance_weights(x, x, mask, mode=mode, cap=1.0, level=level)) == 1).all()


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", objectives.RATIO_LEVELS)
def test_importance_weights_are_never_differentiated(mode, level):
    def total(old):
        mask = jnp.ones((2, 3), bool)
        return objectives.importance_weights(old, jnp.zeros((2, 3)), mask, mode=mode, cap=2.0, level=level).sum()

    value, gradient = jax.value_and_grad(total)(jnp.full((2, 3), 0.1))
    assert value > 6 and (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_nan_of_a_response_token_is_not_hidden(mode):
    ratios = RATIOS.copy()
    ratios[0, 1] = np.nan
    assert np.isnan(_weights(ratios, mode=mode, cap=2.0)[0, 1])


def test_a_cap_below_one_is_an_error():
    with pytest.raises(InputError, match="at least 1"):
        _weights(RATIOS, mode="mask", cap=0.5)


# ---------------------------------------------------------------------- padding


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("estimator", objectives.KL_ESTIMATORS)
@pytest.mark.parametrize("level", objectives.RATIO_LEVELS)
def test_padding_reaches_neither_loss_nor_gradient(value, estimator, level):
    """Every input is non-finite outside the mask, in one row everywhere: all is as if zeros lay there."""
    new, old, advantage, mask = _batch(6)
    reference, sampler = old + 0.3, old - 0.2

    def run(padding):
        new_, *others = (jnp.asarray(np.where(mask, x, padding), jnp.float32) for x in (new, old, reference, sampler))

        def loss(new):
            old, reference, sampler = others
            terms = objectives.policy_terms(new, old, jnp.asarray(advantage, jnp.float32), mask, level=level)
            kl = objectives.divergence(estimator, new, reference, old, mask)
            weights = [
                objectives.importance_weights(old, sampler, mask, mode=mode, cap=1.21, level=level)
                for mode in objectives.SAMPLER_CORRECTIONS
            ]
            return objectives.masked_sum(terms.loss * sum(weights) + 0.5 * kl, mask).sum(), (terms, kl, weights)

        return jax.value_and_grad(loss, has_aux=True)(new_)

    (got, parts), gradient = run(value)
    (expected, expected_parts), expected_gradient = run(0.0)
    assert got == expected
    np.testing.assert_array_equal(gradient, expected_gradient)
    jax.tree.map(np.testing.assert_array_equal, parts, expected_parts)
    assert np.abs(gradient).max() > 0.1 and (np.asarray(gradient)[~mask] == 0).all()
    assert all((np.asarray(weights)[~mask] == 1).all() for weights in parts[2])


@pytest.mark.parametrize("level", objectives.RATIO_LEVELS)
def test_a_nan_of_a_response_token_reaches_the_loss(level):
    """Where the log-probs themselves are broken the update has to be skipped, so it must show."""
    x, mask = jnp.array([[-1.0, jnp.nan]]), jnp.ones((1, 2), bool)
    assert np.isnan(objectives.policy_terms(x, x * 0 - 1, jnp.ones(1), mask, level=level).loss).any()
    assert all(np.isnan(objectives.divergence(name, x, x, x)).any() for name in ("k1", "k2", "k3", "k3_unbiased"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_masked_sum_leaves_masked_values_out(value):
    values = jnp.array([[1.0, 3.0, value], [value, value, value]])
    mask = objectives.response_mask(jnp.array([2, 0]), 3)
    np.testing.assert_array_equal(objectives.masked_sum(values, mask), [4.0, 0.0])
    gradient = jax.grad(lambda x: objectives.masked_sum(x, mask).sum())(values)
    np.testing.assert_array_equal(gradient, [[1, 1, 0], [0, 0, 0]])
    counts = jnp.float32(values > 2)  # of a condition
    np.testing.assert_array_equal(objectives.masked_sum(counts, mask), [1.0, 0.0])


def test_the_mask_comes_from_lengths():
    mask = objectives.response_mask(jnp.array([0, 2, 4]), 4)
    np.testing.assert_array_equal(mask, [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


# ---------------------------------------------------------------------- the weights of a global mini-batch


def _textbook(losses, lengths, counted, aggregation, constant):
    """The loss of a whole mini-batch, a plain loop over tokens in float64 with the definitions of TRL and verl."""
    kept = [losses[row][: lengths[row]] for row in range(len(lengths)) if counted[row]]
    tokens = [value for row in kept for value in row]
    if aggregation == "token":
        return sum(tokens) / max(len(tokens), 1)
    means = [sum(row) / (constant if aggregation == "constant" else max(len(row), 1)) for row in kept]
    return sum(means) / max(len(means), 1)


SPLITS = {
    "whole": [range(12)],
    "rows": [[row] for row in range(12)],
    "threes": [range(at, at + 3) for at in range(0, 12, 3)],
    "unequal": [range(7), range(7, 8), range(8, 12)],
    "by length": [[11, 2, 5], [0, 7, 9, 4, 3], [1, 6, 8, 10]],
    "with padding": [[0, 1, 2, 3, 4, -1, -1], [5, 6, 7, 8, 9, 10, 11], [-1] * 7],  # -1: a row of no response
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aggregation", objectives.AGGREGATIONS)
def test_parts_of_a_mini_batch_add_up_to_the_textbook_s_loss(aggregation, masked, split):
    random = np.random.default_rng(7)
    losses, lengths = random.normal(size=(12, 8)), np.array([8, 1, 5, 8, 3, 2, 8, 4, 0, 7, 8, 6])
    counted = lengths < 8 if masked else np.full(12, True)
    options = {
        "total_tokens": int(lengths[counted].sum()),
        "total_rows": int(counted.sum()),
        "constant_length": 20,
    }

    def part(rows):
        real = np.asarray(rows) >= 0
        of_rows, counts = np.where(real, lengths[rows], 0), np.where(real, counted[rows], False)
        values, mask = jnp.asarray(losses[rows], jnp.float32), objectives.response_mask(jnp.asarray(of_rows), 8)
        weights = objectives.row_weights(of_rows, counts, aggregation, **options)
        assert weights.dtype == np.float32 and weights.shape == (len(rows),)
        return jax.value_and_grad(lambda x: (objectives.masked_sum(x, mask) * weights).sum())(values)

    parts = [part(list(rows)) for rows in SPLITS[split]]
    total = sum(float(value) for value, _ in parts)
    assert total == pytest.approx(_textbook(losses, lengths, counted, aggregation, 20), rel=1e-5)
    whole = part(list(range(12)))[1]
    for rows, (_, gradient) in zip(SPLITS[split], parts, strict=True):
        for row, values in zip(rows, gradient, strict=True):
            np.testing.assert_array_equal(values, whole[row] if row >= 0 else np.zeros(8))


def test_row_weights_by_hand():
    # Two rows counted, of 2 and 6 tokens; the third is truncated and left out, the fourth is padding.
    lengths, counted = np.array([2, 6, 10, 0]), np.array([True, True, False, False])
    totals = {"total_tokens": 8, "total_rows": 2, "constant_length": 10}
    weights = {name: objectives.row_weights(lengths, counted, name, **totals) for name in objectives.AGGREGATIONS}
    np.testing.assert_allclose(weights["token"], [1 / 8, 1 / 8, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(weights["sequence"], [1 / 4, 1 / 12, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(weights["constant"], [1 / 20, 1 / 20, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("aggregation", objectives.AGGREGATIONS)
def test_lengths_and_totals_of_zero_divide_nothing(aggregation):
    totals = {"total_tokens": 0, "total_rows": 0, "constant_length": 4}
    with np.errstate(all="raise"):
        none = objectives.row_weights(np.array([0, 5]), np.zeros(2, bool), aggregation, **totals)
        empty = objectives.row_weights(np.array([0]), np.ones(1, bool), aggregation, **totals)
    assert (none == 0).all() and np.isfinite(empty).all()


def test_a_constant_length_below_one_is_an_error():
    with pytest.raises(InputError, match="constant"):
        one = {"total_tokens": 1, "total_rows": 1, "constant_length": 0}
        objectives.row_weights(np.array([1]), np.array([True]), "constant", **one)


# ---------------------------------------------------------------------- the table


def test_the_stage_s_objective_is_in_the_table_or_an_error_names_the_key():
    stage = Stage("text", ("text",), "grpo", 1, 1, 0.1, "constant", 0, "")
    assert objectives.of_stage(stage) is objectives.OBJECTIVES["grpo"]
    with pytest.raises(InputError, match=r"config\.stages\.text\.objective = 'ppo'; choose one of grpo, sft"):
        objectives.of_stage(dataclasses.replace(stage, objective="ppo"))
