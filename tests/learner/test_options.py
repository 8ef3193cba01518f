"""What config.objective can be told reaches loss and gradient: against the formulas in numpy on recorded log-probs."""

import copy

import numpy as np
import pytest

from capcur_jax.errors import InputError
from tests.learner.conftest import (  # fmt: skip
    EVENLY,
    LENGTHS,
    MASK,
    TEMPERATURE,
    expected,
    fresh_state,
    make_learner,
    relative_differences,
    replaced,
    update,
)

# Options that do not meet in one another's terms are tried together: each learner is a program to compile.
OPTIONS = {
    "sequence ratio, k2": {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.02, "kl_estimator": "k2"},
    "truncated weights, k1": {
        "sampler_correction": "truncate", "sampler_cap": 1.2, "kl_estimator": "k1", "clip_dual": 0.0
    },
    "masked sequence weights, unbiased k3, entropy": {
        "sampler_correction": "mask", "sampler_level": "sequence", "sampler_cap": 1.8,
        "kl_estimator": "k3_unbiased", "entropy_coefficient": 0.3,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradient_are_those_of_the_formula(options, config, parts, processor, batch, logprobs, full_sequences):
    changed = copy.deepcopy(config)
    changed.objective.update(options)
    learner = make_learner(changed, parts, processor)
    # Rows of unequal weight, one of which counts for nothing: as aggregation and mask_truncated make them.
    weights = np.array([0.02, 0.05, 0.0, 0.1, 0.03, 0.04])
    weighted = replaced(batch, weights=weights.astype(np.float32))
    _, result = update(learner, parts, fresh_state(learner, parts), weighted)

    settings = changed.objective
    metrics, slopes = expected(logprobs, batch.responses, settings, weights)
    usual, _ = expected(logprobs, batch.responses, config.objective, weights)
    if settings.sampler_correction == "none":
        metrics.pop("sampler_weight")
    else:
        assert metrics["sampler_weight"] != pytest.approx(1, abs=0.02)
    bonus = np.where(MASK, -settings.entropy_coefficient * weights[:, None], 0)
    _, entropy, gradient = full_sequences(parts[1], TEMPERATURE, slopes, bonus)
    metrics["loss"] += (bonus * np.asarray(entropy)).sum()
    assert metrics["loss"] != pytest.approx(usual["loss"], rel=0.01)
    for name, value in metrics.items():
        assert result.metrics[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    differences = relative_differences(result.gradients, gradient)
    assert max(differences.values()) < 2e-5, differences


def test_without_a_kl_term_the_reference_is_not_looked_at(config, learner, parts, batch, logprobs):
    """The learner has no reference log-probs then; the loss is the policy's alone."""
    metrics, _ = expected(logprobs, batch.responses, config.objective)
    _, result = update(learner, parts, fresh_state(learner, parts), replaced(batch, reference_logprobs=None))
    assert "kl" not in result.metrics
    assert result.metrics["loss"] == pytest.approx(metrics["policy_loss"], rel=1e-4)
    assert EVENLY.sum() * sum(LENGTHS) == pytest.approx(6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ratio", "word", "ratio level 'word'"),
        ("kl_estimator", "k4", "KL estimator 'k4'"),
        ("sampler_correction", "ignore", "sampler correction 'ignore'"),
        ("sampler_cap", 0.5, "cap on the sampler's importance weights is 0.5"),
        ("clip_dual", 0.9, "config.objective.clip_dual=0.9"),
    ],
)
def test_an_impossible_option_is_an_input_error(key, value, message, config, parts, processor, batch):
    changed = copy.deepcopy(config)
    changed.objective.update({"sampler_correction": "mask", key: value})
    learner = make_learner(changed, parts, processor)
    with pytest.raises(InputError, match=message):
        learner.zeros(*learner.split(parts[1]), batch)
