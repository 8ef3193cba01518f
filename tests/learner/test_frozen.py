"""Frozen parameters, first updates, SFT: what has a gradient, what moves, what is kept of it."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capcur_jax import schedule
from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.learner import objectives
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.learner import frozen_paths
from capcur_jax.learner.packing import blank
from capcur_jax.models.batching import Buckets
from capcur_jax.models.packed_rows import Bounds, RowShape
from capcur_jax.records import metrics
from tests.learner.conftest import (  # fmt: skip
    ADVANTAGES,
    EVENLY,
    LENGTHS,
    MASK,
    TEMPERATURE,
    G,
    T,
    fresh_state,
    make_learner,
    norm_of,
    relative_differences,
    replaced,
    same,
    update,
)


@pytest.fixture(scope="module")
def frozen(config, parts, processor):
    """As merged training has it: the vision tower frozen."""
    return make_learner(config, parts, processor, freeze="^visual")


@pytest.fixture(scope="module")
def imitator(config, parts, processor):
    """Sft, the vision tower frozen too."""
    return make_learner(config, parts, processor, objective="sft", freeze="^visual")


def paths(tree):
    return {path for path, _ in nnx.to_flat_state(tree)}


def test_split_is_by_path_and_merges_again(frozen, parts):
    trained, rest = frozen.split(parts[1])
    assert {path[0] for path in paths(rest)} == {"visual"} and "visual" not in {path[0] for path in paths(trained)}
    assert paths(trained) | paths(rest) == paths(parts[1])
    assert same(nnx.merge_state(trained, rest), parts[1])


def test_first_update_has_ratio_one_and_the_plain_policy_gradient(frozen, parts, plain, full_sequences, config):
    weights = np.where(MASK, -ADVANTAGES[:, None], 0) * EVENLY[:, None]
    _, _, want = full_sequences(parts[1], TEMPERATURE, weights)
    state, result = update(frozen, parts, fresh_state(frozen, parts), plain)
    figures = result.metrics
    assert all(figures[f"clip_fraction_{which}"] == 0 for which in ("low", "high", "dual"))
    assert figures["policy_loss"] == pytest.approx(weights.sum(), rel=1e-5)
    assert "kl" not in figures and figures["loss"] == pytest.approx(figures["policy_loss"], rel=1e-6)
    # Frozen parameters have no gradient: neither their own nor a share in the norm that clipping looks at.
    norm = norm_of(want, without="visual")
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm < 0.999 * norm_of(want)
    kept, _ = frozen.split(want)
    assert paths(result.gradients) == paths(state.trained) == paths(state.optimizer.mu) == paths(kept)
    assert max(relative_differences(result.gradients, kept).values()) < 1e-3
    scale = (1 - config.optimizer.beta1) * min(1, config.optimizer.max_gradient_norm / norm)
    moments = relative_differences(state.optimizer.mu, jax.tree.map(lambda g: g * scale, kept))
    assert max(moments.values()) < 1e-3
    before = dict(nnx.to_flat_state(parts[1]))
    for path, leaf in nnx.to_flat_state(state.trained):
        assert not np.array_equal(leaf[...], before[path][...]), path


def test_the_frozen_are_read_where_they_are(frozen, parts, plain):
    """They are no part of the state, but what is scored depends on them."""
    trained, rest = frozen.split(parts[1])
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen.start(jax.tree.map(np.copy, trained)).trained)) == sum(
        leaf.size for leaf in jax.tree.leaves(trained)
    )
    scored, other = (frozen.score(trained, part, plain) for part in (rest, jax.tree.map(lambda x: 2 * x, rest)))
    changed = np.where(MASK, np.abs(np.asarray(scored) - np.asarray(other)), 0).max(axis=1)
    assert (changed[:G] == 0).all() and (changed[G:] > 1e-4).all()  # the second prompt alone has an image


def test_sft_is_the_mean_negative_log_prob_and_leaves_the_frozen(imitator, parts, plain, full_sequences):
    batch = replaced(plain, advantages=None, sampler_logprobs=None)
    before = dict(nnx.to_flat_state(parts[1]))
    start = fresh_state(imitator, parts)
    # Two moments of what is trained, and a few scalars.
    trained = sum(leaf.size for path, leaf in before.items() if path[0] != "visual")
    assert 2 * trained <= sum(leaf.size for leaf in jax.tree.leaves(start.optimizer)) < 2 * trained + 10

    state, result = update(imitator, parts, start, batch, rate=0.01)
    # Target tokens only, at temperature 1 whatever the sampler's is.
    logprobs, entropy, gradient = full_sequences(parts[1], 1.0, np.where(MASK, -1 / sum(LENGTHS), 0))
    loss = -float(np.asarray(logprobs)[MASK].mean())
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert result.metrics["entropy"] == pytest.approx(float(np.asarray(entropy)[MASK].mean()), rel=1e-5)
    assert result.metrics["grad_norm"] == pytest.approx(norm_of(gradient, without="visual"), rel=1e-4)

    for _ in range(30):
        state, result = update(imitator, parts, state, batch, rate=0.01)
    for path, leaf in nnx.to_flat_state(state.trained):  # weight decay is 0.1
        assert not np.array_equal(leaf[...], before[path][...]), path
    assert result.metrics["loss"] < 0.5 * loss and result.metrics["token_accuracy"] > 0.5


@pytest.mark.parametrize("sampled", [True, False])
def test_a_new_objective_is_a_line_in_the_table(monkeypatch, config, parts, processor, plain, full_sequences, sampled):
    """Reward-weighted imitation, registered there and nowhere else: checks take it, and it has a gradient."""

    def loss(responses, new, mask, settings):
        return -jnp.exp(responses.advantages)[:, None] * new.logprobs, {"entropy": new.entropy}

    monkeypatch.setitem(objectives.OBJECTIVES, "weighted", objectives.Objective(loss, sampled))
    config = copy.deepcopy(config)
    config.stages.perception.objective, config.order = "weighted", ("perception",)
    (stage,) = schedule.stages(config)
    layout = Layout.of(stage, config, Buckets((48,)), processor, sharding.single(), images=True)
    assert layout.sampled == sampled and layout.bounds.group == (config.rollout.group if sampled else 1)
    learner = make_learner(config, parts, processor, objective="weighted")
    _, result = update(learner, parts, fresh_state(learner, parts), plain)
    weights = np.where(MASK, -np.exp(ADVANTAGES)[:, None], 0) * EVENLY[:, None]
    logprobs, entropy, gradient = full_sequences(parts[1], TEMPERATURE if sampled else 1.0, weights)
    assert result.metrics["loss"] == pytest.approx(float((np.asarray(logprobs) * weights)[MASK].sum()), rel=1e-5)
    assert result.metrics["entropy"] == pytest.approx(float(np.asarray(entropy)[MASK].mean()), rel=1e-5)
    assert max(relative_differences(result.gradients, gradient).values()) < 1e-3


# ---------------------------------------------------------------------- patterns


def test_a_pattern_picks_parameters_by_their_dotted_path(parts):
    names = {".".join(map(str, path)) for path in paths(parts[1])}
    wanted = {name for name in names if name.startswith(("visual.blocks.", "visual.patch.")) or "norm" in name}
    assert frozen_paths(parts[1], r"^visual\.(blocks|patch)\.|norm") == wanted and 0 < len(wanted) < len(names)
    assert frozen_paths(parts[1], "") == set()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("^vision", "finds no parameter; their names look like text"), ("(", "no regular"), (".", "nothing is left")],
)
def test_a_useless_freeze_pattern_is_an_input_error(parts, pattern, message):
    with pytest.raises(InputError, match=message) as caught:
        frozen_paths(parts[1], pattern)
    assert repr(pattern) in str(caught.value)


# ---------------------------------------------------------------------- compiled programs


def test_a_program_compiles_once_for_a_shape(learner, parts, batch, processor):
    state = fresh_state(learner, parts)
    state, _ = update(learner, parts, state, batch)
    _, rest = learner.split(parts[1])
    sums = learner.zeros(state.trained, rest, batch)
    jax.block_until_ready((state, sums))
    with metrics.CompilationCounter() as counter:
        again = replaced(batch, advantages=-ADVANTAGES)
        for rate in (1e-3, 2e-3):
            for micro in (batch, again):
                sums = learner.accumulate(state.trained, rest, sums, micro)
            state, sums, _ = learner.apply(state, sums, np.float32(rate))
        assert counter.count == 0
        other = blank(1, RowShape(192, 2, 96), Bounds(2, G, 64, T), processor.config, sampled=True)
        for _ in range(2):
            learner.score.compile(state.trained, rest, other)
        assert counter.count == 1
        learner.score(state.trained, rest, other)
        assert counter.count == 1


def test_compile_neither_runs_nor_donates_and_an_update_does(learner, parts, batch):
    state = fresh_state(learner, parts)
    _, rest = learner.split(parts[1])
    sums = learner.zeros(state.trained, rest, batch)
    learner.accumulate.compile(state.trained, rest, sums, batch)
    learner.apply.compile(state, sums, np.float32(1e-3))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, sums)))
    assert same(state.trained, parts[1])
    added = learner.accumulate(state.trained, rest, sums, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(sums.gradients))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.trained))
    learner.apply(state, added, np.float32(1e-3))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trained, state.optimizer.mu, added.gradients)))


def test_a_copy_of_another_dtype_is_one_that_updates_do_not_touch(learner, parts, batch):
    state = fresh_state(learner, parts)
    copies = [learner.copy_as(state.trained, dtype) for dtype in (np.float32, "bfloat16")]
    update(learner, parts, state, batch)
    assert same(copies[0], parts[1])
    assert all(leaf.dtype == "bfloat16" and not leaf.is_deleted() for leaf in jax.tree.leaves(copies[1]))
