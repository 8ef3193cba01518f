"""GRPO updates of a real tiny Qwen3-VL: log-probs, losses, gradients and AdamW against independent implementations, and
what padding, a learning rate and a non-finite batch do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from tests.learner.conftest import (  # fmt: skip
    ADVANTAGES,
    EVENLY,
    LENGTHS,
    MASK,
    TEMPERATURE,
    T,
    expected,
    fresh_state,
    norm_of,
    relative_differences,
    replaced,
    same,
    update,
)

# The score program knows batches without old and reference log-probs.
UNUSED = {"old_logprobs": None, "reference_logprobs": None, "sampler_logprobs": np.zeros((6, T), np.float32)}


def test_score_equals_full_sequences(logprobs, full_sequences, parts):
    want, _, _ = full_sequences(parts[1], TEMPERATURE, np.zeros((6, T)))
    np.testing.assert_allclose(logprobs[MASK], want[MASK], atol=2e-5)


@pytest.fixture(scope="module")
def updated(learner, parts, batch):
    """State and result of one update from fresh."""
    return update(learner, parts, fresh_state(learner, parts), batch)


def test_metrics_equal_the_formula_in_numpy(updated, logprobs, batch, config):
    values, _ = expected(logprobs, batch.responses, config.objective)
    clipped = [values[f"clip_fraction_{which}"] for which in ("low", "high", "dual")]
    assert min(clipped) > 0 and sum(clipped) < 0.8 and values["kl"] > 0.05
    assert values.pop("sampler_weight") == 1 and "sampler_weight" not in updated[1].metrics
    for key, value in values.items():
        assert updated[1].metrics[key] == pytest.approx(value, rel=1e-4), key
    assert updated[1].metrics["skipped_updates"] == 0


def test_entropy_is_that_of_the_whole_distribution(updated, full_sequences, parts):
    _, entropy, _ = full_sequences(parts[1], TEMPERATURE, np.zeros((6, T)))
    assert updated[1].metrics["entropy"] == pytest.approx(float(np.asarray(entropy)[MASK].mean()), rel=1e-5)


def test_gradient_with_a_shared_prompt_is_that_of_full_sequences(
    updated, full_sequences, logprobs, batch, config, parts
):
    """Of the token-mean over the whole mini-batch, image and prompt included."""
    state, result = updated
    _, weights = expected(logprobs, batch.responses, config.objective)
    _, _, want = full_sequences(parts[1], TEMPERATURE, weights)
    norm = float(optax.global_norm(want))
    assert result.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    differences = relative_differences(result.gradients, want)
    assert len(differences) == len(jax.tree.leaves(parts[1])) and max(differences.values()) < 2e-5, differences
    # The first moment holds the clipped one.
    assert norm > config.optimizer.max_gradient_norm
    scale = (1 - config.optimizer.beta1) * config.optimizer.max_gradient_norm / norm
    differences = relative_differences(state.optimizer.mu, jax.tree.map(lambda g: g * scale, want))
    assert max(differences.values()) < 2e-5, differences


def test_an_update_leaves_empty_sums(updated):
    assert updated[1].emptied


def test_two_steps_equal_pytorch_s_adamw_with_clipping(
    updated, full_sequences, learner, logprobs, batch, config, parts
):
    settings, rates = config.optimizer, (1e-3, 3e-4)
    start = parts[1]
    ours = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for leaf in jax.tree.leaves(start)]
    adamw = torch.optim.AdamW(
        ours, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    # The second step sees the same advantages at moved parameters: a different gradient.
    state = jax.tree.map(jnp.copy, updated[0])
    scores = learner.score(state.trained, learner.split(start)[1], replaced(batch, **UNUSED))
    points = [(start, logprobs), (jax.tree.map(jnp.copy, state.trained), np.asarray(scores))]
    for (parameters, scored), rate in zip(points, rates, strict=True):
        _, weights = expected(scored, batch.responses, config.objective)
        _, _, gradient = full_sequences(parameters, TEMPERATURE, weights)
        for parameter, g in zip(ours, jax.tree.leaves(gradient), strict=True):
            parameter.grad = torch.tensor(np.array(g))
        torch.nn.utils.clip_grad_norm_(ours, settings.max_gradient_norm)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
    state, _ = update(learner, parts, state, batch, rate=rates[1])
    for mine, theirs, before in zip(jax.tree.leaves(state.trained), ours, jax.tree.leaves(start), strict=True):
        moved = np.abs(theirs.detach().numpy() - before).max()
        np.testing.assert_allclose(mine, theirs.detach().numpy(), atol=1e-3 * moved + 1e-7)


def test_reference_equal_to_the_policy_costs_nothing(learner, parts, batch, logprobs, full_sequences):
    same_policy = {"old_logprobs": logprobs, "reference_logprobs": logprobs, "sampler_logprobs": logprobs}
    _, result = update(learner, parts, fresh_state(learner, parts), replaced(batch, **same_policy))
    weights = np.where(MASK, -ADVANTAGES[:, None], 0) * EVENLY[:, None]
    _, _, want = full_sequences(parts[1], TEMPERATURE, weights)
    metrics = result.metrics
    assert abs(metrics["kl"]) < 1e-7 and metrics["logprob_difference_max"] == 0
    assert all(metrics[f"clip_fraction_{which}"] == 0 for which in ("low", "high", "dual"))
    assert metrics["loss"] == pytest.approx(weights.sum(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm_of(want), rel=1e-4)


def test_what_the_padding_holds_changes_nothing(learner, parts, batch, updated, processor, prompts):
    """Not even a token that may not be sampled (some checkpoints pad with <|vision_pad|>: log-prob -inf), or NaN."""
    fill = {"old_logprobs": np.nan, "reference_logprobs": np.inf, "sampler_logprobs": np.nan}
    changed = {
        key: np.where(MASK, getattr(batch.responses, key), value).astype(np.float32) for key, value in fill.items()
    }
    empty = np.arange(batch.rows.tokens.shape[1]) >= sum(map(len, prompts)) + sum(LENGTHS)
    tokens = np.where(empty, processor.banned_tokens[0], batch.rows.tokens).astype(np.int32)
    filled = dataclasses.replace(replaced(batch, **changed), rows=dataclasses.replace(batch.rows, tokens=tokens))
    state, result = update(learner, parts, fresh_state(learner, parts), filled)
    assert result.metrics["skipped_updates"] == 0
    for key, value in updated[1].metrics.items():
        assert result.metrics[key] == pytest.approx(value, rel=1e-5), key
    assert max(relative_differences(result.gradients, updated[1].gradients).values()) < 1e-5
    assert max(relative_differences(state.trained, updated[0].trained).values()) < 1e-5


def test_the_learning_rate_is_the_one_given(learner, parts, batch):
    start = parts[1]
    moved = {}
    for rate in (0.0, 1e-3, 2e-3):
        state, _ = update(learner, parts, fresh_state(learner, parts), batch, rate=rate)
        assert float(state.optimizer.learning_rate) == pytest.approx(rate)
        moved[rate] = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.trained, start)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(moved[0.0]))  # neither step nor weight decay
    for once, twice in zip(jax.tree.leaves(moved[1e-3]), jax.tree.leaves(moved[2e-3]), strict=True):
        np.testing.assert_allclose(twice, 2 * once, atol=1e-6)
        assert np.abs(once).max() > 1e-4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_update_leaves_everything_as_it_was(learner, parts, batch, updated, value):
    broken = replaced(batch, advantages=np.where(np.arange(6) == 2, value, ADVANTAGES).astype(np.float32))
    before = updated[0]
    # One bad micro-batch among good ones spoils the sum.
    state, result = update(learner, parts, jax.tree.map(jnp.copy, before), batch, broken, batch)
    assert result.metrics["skipped_updates"] == 1 and state.skipped == 1
    assert not (np.isfinite(result.metrics["loss"]) and np.isfinite(result.metrics["grad_norm"]))
    assert same(state.trained, before.trained) and result.emptied
    # The learning rate is no moment; everything else, the count of steps included, is bit-identical.
    rate = {"learning_rate": 0.0}
    assert same(optax.tree.set(state.optimizer, **rate), optax.tree.set(before.optimizer, **rate))
    # As if the bad batch had never been: the next good one trains just the same.
    after, result = update(learner, parts, state, batch)
    want, _ = update(learner, parts, jax.tree.map(jnp.copy, before), batch)
    assert result.metrics["skipped_updates"] == 1 and same(after.trained, want.trained)
    assert not same(after.trained, before.trained)
