"""One small batch, and what its loss and gradient are by the plainest means: sequences in full, numpy in float64."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capcur_jax import presets
from capcur_jax.devices import sharding
from capcur_jax.learner.learner import Learner, TrainState, token_means
from capcur_jax.learner.packing import Item, Responses, Row, UpdateBatch, collate
from capcur_jax.models import huggingface
from capcur_jax.models.inputs import Processor
from capcur_jax.models.packed_rows import Bounds, RowShape
from tests.conftest import random_image
from tests.packed import padded

G, T, TEMPERATURE = 3, 8, 0.7
LENGTHS = [1, 5, 8, 3, 6, 8]  # rising in each group, as they are packed
ADVANTAGES = np.array([-0.75, -0.75, 1.5, 0.4, 0.8, -1.2], np.float32)
MASK = np.arange(T)[None] < np.array(LENGTHS)[:, None]
EVENLY = np.full(6, 1 / sum(LENGTHS))  # weights of the rows in a mean over tokens


@pytest.fixture(scope="package")
def config():
    config = presets.laptop()
    config.objective.kl_coefficient = 0.5  # large enough to be seen in loss and gradient
    # Clipping binds, and nothing is at its usual value; a large epsilon keeps AdamW from magnifying rounding.
    config.optimizer.update({"max_gradient_norm": 0.5, "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-4})
    config.optimizer.weight_decay = 0.1
    return config


@pytest.fixture(scope="package")
def processor(checkpoint):
    return Processor.from_directory(checkpoint)


@pytest.fixture(scope="package")
def parts(checkpoint):
    return nnx.split(huggingface.load(checkpoint))


@pytest.fixture(scope="package")
def prompts(processor):
    texts = [processor.render(["What shape is in the image?"]), processor.render([None, "3 x 4 ="])]
    return [processor.prepare(texts[0]), processor.prepare(texts[1], [random_image(23, 37)])]


@pytest.fixture(scope="package")
def tokens(processor):
    """Random responses, some of which end with the pad token, which is one of Qwen's end tokens."""
    random = np.random.default_rng(0)
    rows = [random.integers(8, processor.config.text.vocabulary, length).astype(np.int32) for length in LENGTHS]
    rows[0][-1] = rows[1][-1] = processor.pad_token
    assert processor.pad_token in processor.end_tokens
    return rows


def make_learner(config, parts, processor, objective="grpo", freeze="") -> Learner:
    return Learner(
        *parts,
        objective=objective,
        freeze=freeze,
        config=config,
        temperature=TEMPERATURE,
        banned=processor.banned_tokens,
        mesh=sharding.single(),
    )


@pytest.fixture(scope="package")
def learner(config, parts, processor):
    return make_learner(config, parts, processor)


@pytest.fixture(scope="package")
def plain(prompts, tokens, processor):
    """The batch of a first update without a reference policy."""
    zeros = np.zeros(T, np.float32)
    rows = [Row(row, float(EVENLY[0]), float(a), zeros[: len(row)]) for row, a in zip(tokens, ADVANTAGES, strict=True)]
    items = [Item(prompts[0], rows[:G]), Item(prompts[1], rows[G:])]
    bounds, shape = Bounds(groups=2, group=G, prompt=64, response=T), RowShape(160, 2, 96)
    return collate([items], shape, bounds, processor.config, processor.pad_token, sampled=True)


@pytest.fixture(scope="package")
def logprobs(learner, parts, plain):
    return np.asarray(learner.score(*learner.split(parts[1]), plain))


@pytest.fixture(scope="package")
def batch(plain, logprobs):
    """A later update: an old policy and a reference a little (and at some tokens far) from the policy."""
    random = np.random.default_rng(1)
    near = [np.float32(random.normal(0, 0.5, logprobs.shape)) for _ in range(3)]
    near[0][1, 0] = -2.0  # ratio e^2 with a negative advantage: dual clip
    near[1][4, 1] = 5.0  # k3 beyond its clamp
    old, reference, sampler = (logprobs + noise for noise in near)
    return replaced(plain, old_logprobs=old, reference_logprobs=reference, sampler_logprobs=sampler)


def replaced(batch: UpdateBatch, **fields: Any) -> UpdateBatch:
    """A batch whose responses have other fields."""
    return dataclasses.replace(batch, responses=dataclasses.replace(batch.responses, **fields))


class Result(NamedTuple):
    metrics: dict[str, float]  # means over tokens
    gradients: nnx.State
    emptied: bool  # the sums are zeros again


def fresh_state(learner: Learner, parts) -> TrainState:
    """Of copied parameters: updates donate them."""
    return learner.start(learner.split(jax.tree.map(jnp.copy, parts[1]))[0])


def update(learner: Learner, parts, state: TrainState, *batches: UpdateBatch, rate: float = 1e-3):
    """One update by all of these micro-batches: the state after it and its Result."""
    _, frozen = learner.split(parts[1])
    sums = learner.zeros(state.trained, frozen, batches[0])
    for batch in batches:
        sums = learner.accumulate(state.trained, frozen, sums, batch)
    gradients = jax.tree.map(np.array, sums.gradients)  # copied: the sums are donated
    state, sums, metrics = learner.apply(state, sums, np.float32(rate))
    emptied = all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(sums))
    return state, Result(token_means(jax.device_get(metrics)), gradients, emptied)


@pytest.fixture(scope="package")
def full_sequences(parts, prompts, tokens, processor):
    """parameters, temperature, weights [R, T] of log-probs (and of entropies) -> log-probs and entropies [R, T], and
    the gradient of their weighted sum.

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
    sequences = padded(rows, processor, 80, (6, 96))

    @jax.jit
    def run(parameters, temperature, weights, of_entropy):
        def weighted(parameters):
            model = nnx.merge(parts[0], parameters)
            h = model.prefill(sequences)[0][jnp.arange(6)[:, None], where]
            table = jax.nn.log_softmax(model.logits(h)[..., allowed] / temperature, axis=-1)
            logprobs = jnp.take_along_axis(table, place[..., None], axis=-1)[..., 0]
            entropy = -(jnp.exp(table) * table).sum(-1)
            return (logprobs * weights + entropy * of_entropy).sum(), (logprobs, entropy)

        gradient, (logprobs, entropy) = jax.grad(weighted, has_aux=True)(parameters)
        return logprobs, entropy, gradient

    def plainly(parameters, temperature, weights, of_entropy=0.0):
        of_entropy = np.broadcast_to(np.float32(of_entropy), (6, T))
        return run(parameters, np.float32(temperature), np.float32(weights), of_entropy)

    return plainly


def expected(logprobs: np.ndarray, responses: Responses, settings: Any, weights: np.ndarray = EVENLY):
    """The objective token by token in float64: metrics, and the loss's derivative by each log-prob, [R, T].

    `weights`: [R], of the rows in the loss. Of `settings` (config.objective) everything but the entropy bonus.
    """
    sums, derivative, differences = dict.fromkeys(COUNTED, 0.0), np.zeros((6, T)), []
    loss = 0.0
    for r, length in enumerate(LENGTHS):
        advantage, new, old, reference, sampler = (
            np.float64(x[r])
            for x in (
                responses.advantages,
                logprobs,
                responses.old_logprobs,
                responses.reference_logprobs,
                responses.sampler_logprobs,
            )
        )
        row = slice(length)
        mean = np.mean(new[row] - old[row])
        drift = np.exp(np.sum(old[row] - sampler[row]))
        for t in range(length):
            sequence = settings.ratio == "sequence"
            ratio = np.exp(mean if sequence else new[t] - old[t])
            low, high = 1 - settings.clip_low, 1 + settings.clip_high
            used = min(max(ratio, low), high)
            policy = max(-advantage * ratio, -advantage * used)
            if advantage < 0 and settings.clip_dual:
                policy = min(policy, -advantage * settings.clip_dual)
            sums["clip_fraction_low"] += advantage < 0 and ratio < low
            sums["clip_fraction_high"] += advantage > 0 and ratio > high
            sums["clip_fraction_dual"] += bool(advantage < 0 and settings.clip_dual and ratio > settings.clip_dual)
            factor = drift if settings.sampler_level == "sequence" else np.exp(old[t] - sampler[t])
            if settings.sampler_correction == "none":
                factor = 1.0
            elif settings.sampler_correction == "truncate":
                factor = min(factor, settings.sampler_cap)
            elif not 1 / settings.sampler_cap <= factor <= settings.sampler_cap:
                factor = 0.0
            if policy == -advantage * ratio:
                slope = -advantage * ratio * factor * weights[r]
                if sequence:
                    derivative[r, row] += slope / length
                else:
                    derivative[r, t] += slope
            kl, kl_slope = divergence(settings.kl_estimator, new[t], reference[t], old[t])
            derivative[r, t] += settings.kl_coefficient * kl_slope * weights[r]
            loss += weights[r] * (factor * policy + settings.kl_coefficient * kl)
            sums["policy_loss"] += policy
            sums["kl"] += kl
            sums["sampler_weight"] += factor
            differences.append(abs(old[t] - sampler[t]))
    metrics = {name: total / sum(LENGTHS) for name, total in sums.items()}
    metrics |= {"logprob_difference_mean": np.mean(differences), "logprob_difference_max": max(differences)}
    return {**metrics, "loss": loss}, derivative


COUNTED = ("policy_loss", "kl", "sampler_weight", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual")


def divergence(estimator: str, new: float, reference: float, old: float) -> tuple[float, float]:
    """An estimate of the KL and its derivative by the policy's log-prob."""
    d, gap = new - reference, reference - new
    if estimator == "k1":
        return d, 1.0
    if estimator == "k2":
        return d * d / 2, d
    if estimator == "none":
        return 0.0, 0.0
    clamped = np.exp(gap) - gap - 1 > 10
    k3, slope = (10.0, 0.0) if clamped else (np.exp(gap) - gap - 1, 1 - np.exp(gap))
    if estimator == "k3":
        return k3, slope
    ratio = np.exp(new - old)
    return ratio * k3, ratio * (k3 + slope)


def relative_differences(got: nnx.State, want: nnx.State) -> dict[str, float]:
    """Relative L2 difference of each tensor, by its path."""
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(want)}
    return {
        ".".join(map(str, path)): float(np.linalg.norm(np.asarray(leaf[...]) - flat[path]) / np.linalg.norm(flat[path]))
        for path, leaf in nnx.to_flat_state(got)
    }


def norm_of(gradient: nnx.State, without: str = "") -> float:
    squares = [np.sum(np.square(leaf[...])) for path, leaf in nnx.to_flat_state(gradient) if path[0] != without]
    return float(np.sqrt(sum(squares)))


def same(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
