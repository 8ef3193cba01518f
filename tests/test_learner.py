"""Training steps on a real tiny Qwen3-VL: losses, gradients and AdamW against independent implementations, what is
frozen, what a non-finite update leaves behind, and how often anything compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from capcur_jax import metrics, presets
from capcur_jax.data.packing import pack
from capcur_jax.errors import InputError
from capcur_jax.learner import Learner, frozen_labels
from capcur_jax.models.batching import Buckets
from tests.conftest import random_image

pytestmark = pytest.mark.usefixtures("quick_compilation")
G, T, TEMPERATURE = 3, 8, 0.7
LENGTHS = [8, 5, 1, 3, 8, 6]
ADVANTAGES = np.array([1.5, -0.75, -0.75, 0.4, -1.2, 0.8], np.float32)


# ---------------------------------------------------------------------- one batch, two learners, one reference


@pytest.fixture(scope="module")
def config():
    config = presets.laptop()
    config.objective.kl_coefficient = 0.5  # large enough to be seen in loss and gradient
    # Clipping binds, and nothing is at its usual value; a large epsilon keeps AdamW from magnifying rounding.
    config.optimizer.update({"max_gradient_norm": 0.5, "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-4})
    config.optimizer.weight_decay = 0.1
    return config


@pytest.fixture(scope="module")
def parts(model):
    return nnx.split(model)


@pytest.fixture(scope="module")
def prompts(processor):
    texts = [processor.render(["What shape is in the image?"]), processor.render([None, "3 x 4 ="])]
    return [processor.prepare(texts[0]), processor.prepare(texts[1], [random_image(23, 37)])]


@pytest.fixture(scope="module")
def tokens(processor):
    """Random responses, some of which end with the pad token, which is one of Qwen's end tokens."""
    random = np.random.default_rng(0)
    rows = [random.integers(8, processor.config.text.vocabulary, length).astype(np.int32) for length in LENGTHS]
    rows[1][-1] = rows[2][-1] = processor.pad_token
    assert processor.pad_token in processor.end_tokens
    return rows


def make_learner(config, parts, processor, objective="grpo", freeze=""):
    return Learner(
        *parts,
        objective=objective,
        freeze=freeze,
        config=config,
        temperature=TEMPERATURE,
        banned=processor.banned_tokens,
    )


@pytest.fixture(scope="module")
def learner(config, parts, processor):
    return make_learner(config, parts, processor)


@pytest.fixture(scope="module")
def frozen(config, parts, processor):
    """As merged training has it: the vision tower frozen."""
    return make_learner(config, parts, processor, freeze="^visual")


@pytest.fixture(scope="module")
def imitator(config, parts, processor):
    """Sft, the vision tower frozen too."""
    return make_learner(config, parts, processor, objective="sft", freeze="^visual")


@pytest.fixture(scope="module")
def plain(prompts, tokens, processor):
    """The batch of a first update without a reference policy."""
    packed = pack(
        Buckets((48, 64), 96, (1.0,)).collate(prompts, processor.config, 0), tokens, (T, 16), processor.pad_token
    )
    return dataclasses.replace(packed, advantages=ADVANTAGES, sampler_logprobs=np.zeros((6, T), np.float32))


@pytest.fixture(scope="module")
def logprobs(learner, parts, plain):
    return np.asarray(learner.score(parts[1], plain))


@pytest.fixture(scope="module")
def batch(plain, logprobs):
    """A later update: an old policy and a reference a little (and at some tokens far) from the policy."""
    random = np.random.default_rng(1)
    near = [np.float32(random.normal(0, 0.4, logprobs.shape)) for _ in range(3)]
    near[0][1, 0] = -2.0  # ratio e^2 with a negative advantage: dual clip
    near[1][4, 1] = 5.0  # k3 beyond its clamp
    old, reference, sampler = (logprobs + noise for noise in near)
    return dataclasses.replace(plain, old_logprobs=old, reference_logprobs=reference, sampler_logprobs=sampler)


def mask_of(batch):
    return np.arange(T)[None] < np.asarray(batch.lengths)[:, None]


def fresh_state(learner, parts):
    """Of copied parameters: updates donate them."""
    return learner.start(jax.tree.map(jnp.copy, parts[1]))


@pytest.fixture(scope="module")
def full_sequences(parts, prompts, tokens, processor, quick_jit):
    """parameters, temperature, weights [R, T] -> log-probs [R, T] and the gradient of their weighted sum.

    The plain way: prompt and response are one causal sequence a row, softmax is over everything that is not banned.
    """
    rows, where, place = [], np.zeros((6, T), np.int32), np.zeros((6, T), np.int32)
    allowed = np.setdiff1d(np.arange(processor.config.text.vocabulary), processor.banned_tokens)
    for r, response in enumerate(tokens):
        prompt, length = prompts[r // G], len(response)
        positions = np.tile(prompt.next_position + np.arange(length, dtype=np.int32), (3, 1))
        rows.append(
            dataclasses.replace(
                prompt,
                tokens=np.concatenate([prompt.tokens, response]),
                positions=np.concatenate([prompt.positions, positions], axis=1),
                visual_index=np.concatenate([prompt.visual_index, np.full(length, -1, np.int32)]),
            )
        )
        where[r, :length] = len(prompt) - 1 + np.arange(length)
        place[r, :length] = np.searchsorted(allowed, response)
    sequences = Buckets((80,), 96, (1.0,)).collate(rows, processor.config, processor.pad_token)

    @quick_jit
    def run(parameters, temperature, weights):
        def weighted(parameters):
            model = nnx.merge(parts[0], parameters)
            h = model.prefill(sequences)[0][jnp.arange(6)[:, None], where]
            table = jax.nn.log_softmax(model.logits(h)[..., allowed] / temperature, axis=-1)
            logprobs = jnp.take_along_axis(table, place[..., None], axis=-1)[..., 0]
            return (logprobs * weights).sum(), logprobs

        gradient, logprobs = jax.grad(weighted, has_aux=True)(parameters)
        return logprobs, gradient

    return lambda parameters, temperature, weights: run(parameters, np.float32(temperature), np.float32(weights))


def expected(logprobs, batch, settings):
    """The paper's loss token by token in float64: metrics, and the loss's derivative by each log-prob."""
    tokens, policy, kl, clipped, differences = sum(LENGTHS), 0.0, 0.0, 0, []
    weights = np.zeros((6, T))
    for r, length in enumerate(LENGTHS):
        advantage = float(batch.advantages[r])
        for t in range(length):
            new, old, reference = (float(x[r, t]) for x in (logprobs, batch.old_logprobs, batch.reference_logprobs))
            ratio = np.exp(new - old)
            best = max(-advantage * ratio, -advantage * min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high))
            loss = min(best, -advantage * settings.clip_dual) if advantage < 0 else best
            policy += loss
            if loss == -advantage * ratio:
                weights[r, t] -= advantage * ratio
            else:
                clipped += 1
            k3 = np.exp(reference - new) - (reference - new) - 1
            kl += min(k3, 10.0)
            weights[r, t] += settings.kl_coefficient * (1 - np.exp(reference - new)) * (k3 < 10)
            differences.append(abs(old - float(batch.sampler_logprobs[r, t])))
    values = {
        "policy_loss": policy / tokens,
        "kl": kl / tokens,
        "clip_fraction": clipped / tokens,
        "logprob_difference_mean": np.mean(differences),
        "logprob_difference_max": max(differences),
        "loss": policy / tokens + settings.kl_coefficient * kl / tokens,
    }
    return values, weights / tokens


def relative_differences(got, want):
    """Relative L2 difference of each tensor, by its path."""
    flat = dict(nnx.to_flat_state(want))
    return {
        ".".join(map(str, path)): float(
            np.linalg.norm(np.asarray(leaf[...]) - flat[path][...]) / np.linalg.norm(flat[path][...])
        )
        for path, leaf in nnx.to_flat_state(got)
    }


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ---------------------------------------------------------------------- log-probs


def test_score_equals_full_sequences(logprobs, full_sequences, parts, plain):
    mask = mask_of(plain)
    want, _ = full_sequences(parts[1], TEMPERATURE, np.zeros((6, T)))
    np.testing.assert_allclose(logprobs[mask], want[mask], atol=2e-5)


# ---------------------------------------------------------------------- the GRPO update


@pytest.fixture(scope="module")
def updated(learner, parts, batch):
    """State and metrics after one update from fresh."""
    state, result = learner.update(fresh_state(learner, parts), batch, np.float32(1e-3))
    return state, jax.device_get(result)


def test_grpo_metrics_equal_the_formula_in_numpy(updated, logprobs, batch, config):
    values, _ = expected(logprobs, batch, config.objective)
    assert 0.2 < values["clip_fraction"] < 0.8 and values["kl"] > 0.05
    for key, value in values.items():
        assert updated[1][key] == pytest.approx(value, rel=1e-4), key
    assert updated[1]["skipped_updates"] == 0


def test_entropy_is_that_of_the_whole_distribution(updated, config):
    # Nearly uniform over the tokens that may be sampled: the random model's logits are small.
    assert 0.5 * np.log(320) < updated[1]["entropy"] < np.log(320 - 5)


def test_gradient_with_a_shared_prompt_is_that_of_full_sequences(
    updated, full_sequences, logprobs, batch, config, parts
):
    """Of the token-mean over the whole mini-batch, image and prompt included; the first moment shows the gradient."""
    _, weights = expected(logprobs, batch, config.objective)
    _, want = full_sequences(parts[1], TEMPERATURE, weights)
    norm = float(optax.global_norm(want))
    assert updated[1]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > config.optimizer.max_gradient_norm  # so that clipping is part of what is compared
    scale = (1 - config.optimizer.beta1) * config.optimizer.max_gradient_norm / norm
    moments = optax.tree.get(updated[0].optimizer, "mu")
    differences = relative_differences(moments, jax.tree.map(lambda g: g * scale, want))
    assert len(differences) == len(jax.tree.leaves(parts[1])) and max(differences.values()) < 1e-3, differences


def test_two_steps_equal_pytorch_s_adamw_with_clipping(
    updated, full_sequences, learner, logprobs, batch, config, parts
):
    settings, rates = config.optimizer, (1e-3, 3e-4)
    start = parts[1]
    ours = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for leaf in jax.tree.leaves(start)]
    adamw = torch.optim.AdamW(
        ours, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    # The second step sees the same loss weights at moved parameters: a different gradient.
    state = jax.tree.map(jnp.copy, updated[0])
    scores = np.asarray(learner.score(state.parameters, dataclasses.replace(batch, **UNUSED)))
    points = [(start, logprobs), (jax.tree.map(jnp.copy, state.parameters), scores)]
    for (parameters, scored), rate in zip(points, rates, strict=True):
        _, weights = expected(scored, batch, config.objective)
        _, gradient = full_sequences(parameters, TEMPERATURE, weights)
        for parameter, g in zip(ours, jax.tree.leaves(gradient), strict=True):
            parameter.grad = torch.tensor(np.array(g))
        torch.nn.utils.clip_grad_norm_(ours, settings.max_gradient_norm)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
    state, _ = learner.update(state, batch, np.float32(rates[1]))
    for mine, theirs, before in zip(jax.tree.leaves(state.parameters), ours, jax.tree.leaves(start), strict=True):
        moved = np.abs(theirs.detach().numpy() - before).max()
        np.testing.assert_allclose(mine, theirs.detach().numpy(), atol=1e-3 * moved + 1e-7)


# The score program knows batches without old and reference log-probs.
UNUSED = {"old_logprobs": None, "reference_logprobs": None, "sampler_logprobs": np.zeros((6, T), np.float32)}


@pytest.fixture(scope="module")
def policy_gradient(parts, plain, full_sequences):
    """Weights of the log-probs where every ratio is 1, and the gradient that they make."""
    weights = np.where(mask_of(plain), -ADVANTAGES[:, None], 0) / sum(LENGTHS)
    return weights, full_sequences(parts[1], TEMPERATURE, weights)[1]


def norm_of(gradient, without=""):
    squares = [np.sum(np.square(leaf[...])) for path, leaf in nnx.to_flat_state(gradient) if path[0] != without]
    return float(np.sqrt(sum(squares)))


def test_first_update_has_ratio_one_and_the_plain_policy_gradient(frozen, parts, plain, policy_gradient, config):
    weights, want = policy_gradient
    state, result = frozen.update(fresh_state(frozen, parts), plain, np.float32(1e-3))
    assert result["clip_fraction"] == 0
    assert float(result["policy_loss"]) == pytest.approx(weights.sum(), rel=1e-5)
    assert "kl" not in result and result["loss"] == result["policy_loss"]
    # Frozen parameters have no gradient: neither their own nor a share in the norm that clipping looks at.
    norm = norm_of(want, without="visual")
    assert float(result["grad_norm"]) == pytest.approx(norm, rel=1e-4) and norm < 0.999 * norm_of(want)
    scale = (1 - config.optimizer.beta1) * min(1, config.optimizer.max_gradient_norm / norm)
    moments = [leaf[...] for leaf in jax.tree.leaves(optax.tree.get(state.optimizer, "mu"))]
    trained = [leaf[...] for path, leaf in nnx.to_flat_state(want) if path[0] != "visual"]
    for moment, gradient in zip(moments, trained, strict=True):
        assert np.linalg.norm(moment - scale * gradient) < 1e-3 * np.linalg.norm(scale * gradient)
    before = dict(nnx.to_flat_state(parts[1]))
    for path, leaf in nnx.to_flat_state(state.parameters):  # weight decay is 0.1
        assert np.array_equal(leaf[...], before[path][...]) == (path[0] == "visual"), path


def test_reference_equal_to_the_policy_costs_nothing(learner, parts, batch, logprobs, policy_gradient):
    same_policy = {"old_logprobs": logprobs, "reference_logprobs": logprobs, "sampler_logprobs": logprobs}
    at_start = dataclasses.replace(batch, **same_policy)
    _, result = learner.update(fresh_state(learner, parts), at_start, np.float32(1e-3))
    weights, want = policy_gradient
    assert abs(float(result["kl"])) < 1e-7 and result["clip_fraction"] == 0
    assert result["logprob_difference_max"] == 0
    assert float(result["loss"]) == pytest.approx(weights.sum(), rel=1e-5)
    assert float(result["grad_norm"]) == pytest.approx(norm_of(want), rel=1e-4)


def test_what_the_padding_holds_changes_nothing(learner, parts, batch, updated, processor):
    """Not even a token that may not be sampled (some checkpoints pad with <|vision_pad|>: log-prob -inf), or NaN."""
    mask = mask_of(batch)
    fill = {"old_logprobs": np.nan, "reference_logprobs": np.inf, "sampler_logprobs": np.nan}
    changed = {key: np.where(mask, getattr(batch, key), value).astype(np.float32) for key, value in fill.items()}
    changed["tokens"] = np.where(mask, batch.tokens, processor.banned_tokens[0]).astype(np.int32)
    state, result = learner.update(fresh_state(learner, parts), dataclasses.replace(batch, **changed), np.float32(1e-3))
    assert result["skipped_updates"] == 0
    for key, value in updated[1].items():
        assert float(result[key]) == pytest.approx(float(value), rel=1e-5), key
    assert max(relative_differences(state.parameters, updated[0].parameters).values()) < 1e-5


def test_the_learning_rate_is_the_one_given(learner, parts, batch):
    start = parts[1]
    moved = {}
    for rate in (0.0, 1e-3, 2e-3):
        state, _ = learner.update(fresh_state(learner, parts), batch, np.float32(rate))
        assert int(optax.tree.get(state.optimizer, "learning_rate") * 1e6 + 0.5) == int(rate * 1e6 + 0.5)
        moved[rate] = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.parameters, start)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(moved[0.0]))  # neither step nor weight decay
    for once, twice in zip(jax.tree.leaves(moved[1e-3]), jax.tree.leaves(moved[2e-3]), strict=True):
        np.testing.assert_allclose(twice, 2 * once, atol=1e-6)
        assert np.abs(once).max() > 1e-4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_update_leaves_everything_as_it_was(learner, batch, updated, value):
    broken = dataclasses.replace(batch, advantages=np.where(np.arange(6) == 2, value, ADVANTAGES).astype(np.float32))
    before = updated[0]
    state, result = learner.update(jax.tree.map(jnp.copy, before), broken, np.float32(1e-3))
    assert result["skipped_updates"] == 1 and state.skipped == 1
    assert not (np.isfinite(result["loss"]) and np.isfinite(result["grad_norm"]))
    assert same(state.parameters, before.parameters)
    # The learning rate is no moment; everything else, the count of steps included, is bit-identical.
    rate = {"learning_rate": 0.0}
    assert same(optax.tree.set(state.optimizer, **rate), optax.tree.set(before.optimizer, **rate))
    # As if the bad batch had never been: the next good one trains just the same.
    after, result = learner.update(state, batch, np.float32(1e-3))
    want, _ = learner.update(jax.tree.map(jnp.copy, before), batch, np.float32(1e-3))
    assert result["skipped_updates"] == 1 and same(after.parameters, want.parameters)
    assert not same(after.parameters, before.parameters)


# ---------------------------------------------------------------------- SFT, frozen parameters


def test_sft_is_the_mean_negative_log_prob_and_leaves_the_frozen(imitator, parts, plain, full_sequences):
    batch = dataclasses.replace(plain, advantages=None, sampler_logprobs=None)
    mask, before = mask_of(plain), dict(nnx.to_flat_state(parts[1]))
    start = fresh_state(imitator, parts)
    # Two moments of what is trained, and a few scalars.
    trained = sum(leaf.size for path, leaf in before.items() if path[0] != "visual")
    assert 2 * trained <= sum(leaf.size for leaf in jax.tree.leaves(start.optimizer)) < 2 * trained + 10

    state, result = imitator.update(start, batch, np.float32(0.01))
    # Target tokens only, at temperature 1 whatever the sampler's is.
    logprobs, gradient = full_sequences(parts[1], 1.0, np.where(mask, -1 / sum(LENGTHS), 0))
    loss = -float(np.asarray(logprobs)[mask].mean())
    assert float(result["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(result["grad_norm"]) == pytest.approx(norm_of(gradient, without="visual"), rel=1e-4)

    for _ in range(30):
        state, result = imitator.update(state, batch, np.float32(0.01))
    for path, leaf in nnx.to_flat_state(state.parameters):  # weight decay is 0.1
        assert np.array_equal(leaf[...], before[path][...]) == (path[0] == "visual"), path
    assert float(result["loss"]) < 0.5 * loss and result["token_accuracy"] > 0.5


def test_a_pattern_picks_parameters_by_their_dotted_path(parts):
    labels = dict(nnx.to_flat_state(frozen_labels(parts[1], r"^visual\.(blocks|patch)\.|norm")))
    for path, label in labels.items():
        name = ".".join(map(str, path))
        wanted = name.startswith(("visual.blocks.", "visual.patch.")) or "norm" in name
        assert label == ("frozen" if wanted else "trained"), name
    assert set(jax.tree.leaves(frozen_labels(parts[1], ""))) == {"trained"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("^vision", "finds no parameter; their names look like text"), ("(", "no regular"), (".", "nothing is left")],
)
def test_a_useless_freeze_pattern_is_an_input_error(parts, pattern, message):
    with pytest.raises(InputError, match=message) as caught:
        frozen_labels(parts[1], pattern)
    assert repr(pattern) in str(caught.value)


# ---------------------------------------------------------------------- compiled programs


def test_a_program_compiles_once_for_a_shape(learner, parts, batch, updated, prompts, tokens, processor):
    state = fresh_state(learner, parts)
    jax.block_until_ready(state)
    with metrics.CompilationCounter() as counter:
        again = dataclasses.replace(batch, advantages=-ADVANTAGES, lengths=np.full(6, T, np.int32))
        for rate in (1e-3, 2e-3):
            state, _ = learner.update(state, again, np.float32(rate))
        assert counter.count == 0
        other = pack(batch.prompts, tokens, (2 * T,), processor.pad_token, advantages=ADVANTAGES)
        other = dataclasses.replace(other, sampler_logprobs=np.zeros((6, 2 * T), np.float32))
        for _ in range(2):
            learner.score.compile(state.parameters, other)
        assert counter.count == 1
        learner.score(state.parameters, other)
        assert counter.count == 1


def test_compile_neither_runs_nor_donates_and_an_update_does(learner, parts, batch, updated):
    state = fresh_state(learner, parts)
    learner.update.compile(state, batch, np.float32(1e-3))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert same(state.parameters, parts[1])
    learner.update(state, batch, np.float32(1e-3))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.parameters))
