"""How a mini-batch is packed changes nothing: micro-batches, lengths of rows, the order of its groups."""

import copy
import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capcur_jax import schedule
from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.learner import Learner, token_means
from capcur_jax.learner.minibatches import Micro, minibatches, sampled_item, target_item
from capcur_jax.learner.trainer import Trainer, combined
from capcur_jax.models import huggingface
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.models.inputs import Prompt
from capcur_jax.rollout.engine import Sample
from tests.conftest import random_image
from tests.learner.conftest import relative_differences, replaced

G, LIMIT, RATE = 3, 8, 1e-3
BUCKETS = Buckets((96,))
PACKINGS = {  # few shapes: each is a program to compile
    "one micro-batch": {"shapes": ((320, 6, 64),), "groups": 4},
    "several": {"shapes": ((80, 6, 64), (128, 6, 64)), "groups": 2},
    "groups in parts": {"shapes": ((48, 1, 40), (48, 2, 40)), "groups": 2},
}
WEIGHTINGS = list(itertools.product(("token", "sequence", "constant"), (False, True)))


class Scene(NamedTuple):
    config: object
    mesh: jax.sharding.Mesh
    learner: Learner
    parameters: nnx.State
    groups: list[tuple[Prompt, list[Sample], np.ndarray]]
    processor: object

    def layout(self, packing="one micro-batch", updates=1) -> Layout:
        config = copy.deepcopy(self.config)
        config.packing.update(PACKINGS[packing] if isinstance(packing, str) else packing)
        config.objective.updates_per_batch = updates
        (stage,) = schedule.stages(config)
        sizes = [PromptSize.of(prompt) for prompt, _, _ in self.groups]
        return Layout.of(stage, config, BUCKETS, self.processor, self.mesh, True, sizes)

    def batches(self, items, packing="one micro-batch", aggregation="token"):
        """The micro-batches of one update."""
        config = copy.deepcopy(self.config)
        config.objective.aggregation = aggregation
        (minibatch,) = minibatches(items, self.layout(packing), config)
        return [micro.batch() for micro in minibatch]

    def items(self, mask_truncated=False, order=None):
        return [sampled_item(*self.groups[n], mask_truncated) for n in order or range(len(self.groups))]


@pytest.fixture(scope="module")
def scene(config, checkpoint, processor):
    """Four groups; prompts with none to two images, responses of 1 to 8 tokens, some of which were cut off."""
    config = copy.deepcopy(config)
    config.rollout.update({"group": G, "max_new_tokens": LIMIT})
    config.order = ("perception",)
    config.stages.perception.prompts = 4
    mesh = sharding.make_mesh(config.mesh)
    model = huggingface.load(checkpoint, mesh=mesh)
    graph, parameters = nnx.split(model)
    learner = Learner(
        graph, parameters, objective="grpo", freeze="", config=config, temperature=1.0, banned=processor.banned_tokens,
        mesh=mesh,
    )  # fmt: skip
    random, groups = np.random.default_rng(3), []
    for number, lengths in enumerate(([8, 2, 8], [1, 4, 3], [5, 8, 6], [4, 2, 1])):
        images = [random_image(18 + 9 * i, 26, seed=number) for i in range(number % 3)]
        text = processor.render([None] * len(images) + ["What shape is it? " * (1 + number % 2)])
        samples = [
            Sample.whole(
                random.integers(8, 300, length).astype(np.int32),
                random.normal(-6, 0.3, length).astype(np.float32),
                "length" if length == LIMIT else "stop",
                0,
            )
            for length in lengths
        ]
        groups.append((processor.prepare(text, images), samples, random.normal(size=G).astype(np.float32)))
    return Scene(config, mesh, learner, parameters, groups, processor)


def summed(scene: Scene, minibatch):
    """Metrics and gradients of a mini-batch, with old and reference log-probs of the policy moved a little."""
    learner = scene.learner
    trained, frozen = learner.split(scene.parameters)
    sums = None
    for batch in minibatch:
        placed = sharding.put(scene.mesh, batch)
        sums = learner.zeros(trained, frozen, placed) if sums is None else sums
        sums = learner.accumulate(trained, frozen, sums, placed)
    sums = jax.device_get(sums)
    metrics = token_means({**sums.metrics, "grad_norm": 0.0, "skipped_updates": 0})
    return {**metrics, "tokens": float(sums.metrics["tokens"])}, sums.gradients


@pytest.fixture(scope="module")
def whole(scene):
    """The results of the plainest packing, by aggregation and mask_truncated."""
    found = {}
    for aggregation, masked in WEIGHTINGS:
        (batch,) = scene.batches(scene.items(masked), aggregation=aggregation)
        assert batch.rows.tokens.shape == (1, 320) and batch.responses.weights.shape == (4 * G,)
        found[aggregation, masked] = summed(scene, [batch])
    return found


def check(got, want):
    """As near as additions in another order come in float32: a few roundings of 6e-8 in the loss, some 1e-6 in the
    gradient."""
    for name, value in want[0].items():
        assert got[0][name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    differences = relative_differences(got[1], want[1])
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize("packing", [name for name in PACKINGS if name != "one micro-batch"])
def test_a_packing_changes_neither_loss_nor_metrics_nor_gradient(scene, whole, packing):
    for aggregation, masked in WEIGHTINGS:
        minibatch = scene.batches(scene.items(masked), packing, aggregation)
        assert len(minibatch) > 1
        check(summed(scene, minibatch), whole[aggregation, masked])


def test_the_packings_compared_are_different_ones(scene):
    several = scene.batches(scene.items(), "several")
    assert [batch.rows.tokens.shape[1] for batch in several] == [128, 80]
    parts = scene.batches(scene.items(), "groups in parts")
    assert {len(batch.rows.vision.segments) for batch in parts} == {1, 2}
    groups = sum(int((batch.rows.places.prompt_length > 0).sum()) for batch in parts)
    assert groups > len(scene.groups)  # some prompts lie in two rows


def test_the_order_of_groups_changes_nothing(scene, whole):
    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        minibatch = scene.batches(scene.items(True, order), "several", "sequence")
        check(summed(scene, minibatch), whole["sequence", True])


def test_weightings_differ_and_are_the_formulas(scene, whole):
    """Else the comparisons above would compare nothing."""
    losses = [whole[key][0]["loss"] for key in WEIGHTINGS]
    assert np.abs(np.subtract.outer(losses, losses) + np.eye(6)).min() > 1e-3
    lengths = np.array([len(sample.tokens) for _, samples, _ in scene.groups for sample in samples])
    for aggregation, masked in WEIGHTINGS:
        minibatch = scene.batches(scene.items(masked), "several", aggregation)
        counted = lengths < LIMIT if masked else lengths > 0
        sizes = {"token": lengths * counted, "sequence": counted, "constant": LIMIT * counted}[aggregation]
        per_token = lengths if aggregation == "sequence" else np.ones_like(lengths)
        want = np.where(counted, 1 / per_token / sizes.sum(), 0)
        lengths_ = [batch.rows.places.response_length.reshape(-1) for batch in minibatch]
        weights = [batch.responses.weights for batch in minibatch]
        got = [pair for pair in zip(np.concatenate(lengths_), np.concatenate(weights), strict=True) if pair[0]]
        for (length, weight), (expected_length, expected_weight) in zip(
            sorted(map(tuple, np.array(got).tolist())), sorted(zip(lengths.tolist(), want.tolist(), strict=True)),
            strict=True,
        ):  # fmt: skip
            assert length == expected_length and weight == pytest.approx(expected_weight, rel=1e-6)
        # A constant number for each response, were the objective to give each token 1.
        totals = float((np.concatenate(lengths_) * np.concatenate(weights)).sum())
        assert totals == pytest.approx((want * lengths).sum(), rel=1e-6)


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_response_is_packed_once_with_what_is_its_own(scene, packing):
    found = {}
    for batch in scene.batches(scene.items(), packing):
        (tokens,), places, of = batch.rows.tokens, batch.rows.places, batch.responses
        spans = [slice(a, a + n) for a, n in zip(places.prompt_start[0], places.prompt_length[0], strict=True)]
        for r, (start, length) in enumerate(zip(places.response_start[0], places.response_length[0], strict=True)):
            if length:
                key = tokens[start : start + length].tobytes()
                assert key not in found
                prompt = tokens[spans[r // G]]
                found[key] = prompt.tobytes(), of.advantages[r], of.sampler_logprobs[r, :length].tobytes()
            else:
                assert of.weights[r] == 0
    for prompt, samples, advantages in scene.groups:
        for sample, advantage in zip(samples, advantages, strict=True):
            want = prompt.tokens.tobytes(), advantage, sample.logprobs.tobytes()
            assert found.pop(sample.tokens.tobytes()) == want
    assert not found


def test_what_changes_in_a_group_changes_that_group_alone(scene):
    """A pixel, a prompt's token, a response's token: the log-probs of its group from there on, and no other's."""
    (batch,) = scene.batches(scene.items())
    learner = scene.learner
    parts = learner.split(scene.parameters)
    places = jax.tree.map(lambda x: x[0], batch.rows.places)
    inside = np.arange(LIMIT) < places.response_length[:, None]
    before = np.where(inside, learner.score(*parts, batch), 0)

    def changed(**fields):
        after = learner.score(*parts, dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, **fields)))
        return np.abs(np.where(inside, after, 0) - before) > 1e-7

    b = int(np.flatnonzero([(batch.rows.visual_index[0, at] >= 0).any() for at in _spans(places)])[0])
    own = np.arange(len(inside)) // G == b
    feature = batch.rows.visual_index[0][_spans(places)[b]].max()
    patches = batch.rows.vision.patches.copy()
    patches.reshape(-1, patches.shape[-1])[4 * feature] += 1
    pixel = changed(vision=dataclasses.replace(batch.rows.vision, patches=patches))
    assert (pixel[own].sum(1) == inside[own].sum(1)).all() and not pixel[~own].any()

    def other(at):
        tokens = batch.rows.tokens.copy()
        tokens[0, at] = 20 + tokens[0, at] % 100
        return changed(tokens=tokens)

    token = other(places.prompt_start[b] + 1)
    assert token[own].any(1).all() and not token[~own].any()
    row = int(np.argmax(places.response_length * own))
    token = other(places.response_start[row] + 1)
    assert token[row, 1] and not token[row, 0] and not np.delete(token, row, 0).any()


def _spans(places):
    return [slice(at, at + n) for at, n in zip(places.prompt_start, places.prompt_length, strict=True)]


# ---------------------------------------------------------------------- whole steps


def test_a_step_of_several_updates_has_one_old_policy_and_reference(scene):
    """Trainer.step against its parts: both passes come before any update, each micro-batch gets its own."""
    layout = scene.layout({"shapes": ((192, 6, 64),), "groups": 2}, updates=2)
    batched = minibatches(scene.items(), layout, scene.config)
    assert [len(mini) for mini in batched] == [1, 1] and layout.old and layout.reference and layout.scores
    learner, mesh = scene.learner, scene.mesh
    trained, frozen = learner.split(jax.tree.map(lambda x: x + 0, scene.parameters))
    reference = jax.tree.map(lambda x: 0.9 * x, trained)
    trainer = Trainer(learner, mesh, learner.start(trained), frozen, reference=reference)
    trainer.sums = learner.zeros(trained, frozen, next(layout.blanks(passes=False)))
    results = trainer.step(batched, layout.old, [RATE, 2 * RATE])

    start, _ = learner.split(jax.tree.map(lambda x: x + 0, scene.parameters))
    fields = []
    for (micro,) in batched:
        placed = sharding.put(mesh, micro.batch())
        old, given = learner.score(start, frozen, placed), learner.score(reference, frozen, placed)
        fields.append(replaced(placed, old_logprobs=old, reference_logprobs=given))
    state, updates = learner.start(start), []
    for placed, rate in zip(fields, (RATE, 2 * RATE), strict=True):
        sums = learner.accumulate(state.trained, frozen, learner.zeros(state.trained, frozen, placed), placed)
        state, _, metrics = learner.apply(state, sums, np.float32(rate))
        updates.append(jax.device_get(metrics))
    for got, want in zip(jax.device_get(results), updates, strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert float(got[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    assert max(relative_differences(trainer.state.trained, state.trained).values()) < 1e-6
    first, second = updates
    ratios = [abs(float(m["policy_loss"])) for m in updates]
    assert ratios[0] > 0 and first["kl"] > 0
    record = combined(updates)
    tokens = first["tokens"] + second["tokens"]
    assert record["kl"] == pytest.approx(float(first["kl"] + second["kl"]) / float(tokens), rel=1e-6)
    assert record["loss"] == pytest.approx(float(first["loss"] + second["loss"]) / 2, rel=1e-6)
    assert record["logprob_difference_max"] == max(first["logprob_difference_max"], second["logprob_difference_max"])
    assert "tokens" not in record and record["skipped_updates"] == 0


def test_the_first_of_several_updates_has_ratio_one_in_bfloat16(scene, checkpoint, monkeypatch):
    """Two programs round differently; the policy's log-probs against themselves don't. Off by a rounding, tokens beside
    a clip's bound would be clipped (verl #6280)."""
    config = copy.deepcopy(scene.config)
    config.objective.update(
        {"kl_coefficient": 0.0, "clip_low": 0.0, "clip_high": 0.0}
    )  # every ratio but 1 is clipped, on one side at least
    graph, parameters = nnx.split(huggingface.load(checkpoint, mesh=scene.mesh, dtype=jnp.bfloat16))
    kinds = dict(objective="grpo", freeze="", temperature=1.0, banned=scene.processor.banned_tokens, mesh=scene.mesh)
    learner = Learner(graph, parameters, config=config, **kinds)
    trained, frozen = learner.split(parameters)
    trainer = Trainer(learner, scene.mesh, learner.start(trained), frozen)
    layout = scene._replace(config=config).layout({"shapes": ((192, 6, 64),), "groups": 2}, updates=2)
    batched = minibatches(scene.items(), layout, config)
    trainer.sums = learner.zeros(trainer.state.trained, frozen, next(layout.blanks(passes=False)))
    made = []
    collate = Micro.batch
    monkeypatch.setattr(Micro, "batch", lambda micro: made.append(micro) or collate(micro))
    first, second = jax.device_get(trainer.step(batched, layout.old, [RATE, RATE]))
    assert float(first["clip_fraction"]) == 0.0 < float(second["clip_fraction"])
    (one,), (other,) = batched
    assert made == [other, one, other]  # no pass reads the first update's arrays before its gradient does


def test_the_warm_up_knows_every_shape_that_a_batch_takes(scene):
    def signature(batch):
        return jax.tree.structure(batch), [(leaf.shape, np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(batch)]

    random = np.random.default_rng(0)
    for packing in (
        *PACKINGS.values(),
        {"shapes": ((80, 1, 64), (80, 4, 64), (96, 2, 64), (96, 4, 64), (128, 4, 64)), "groups": 1},
    ):
        layout, seen = scene.layout(packing), []
        known = [signature(batch) for batch in layout.blanks(passes=True)]
        assert len(known) == len(packing["shapes"])
        for _ in range(8):
            order = random.integers(0, 4, 4).tolist()
            for mini in minibatches(scene.items(order=order), layout, scene.config):
                seen += [signature(micro.batch()) for micro in mini]
        assert all(one in known for one in seen)
        later = [batch.responses for batch in layout.blanks(passes=False)]
        assert len(later) == len(known) and all(of.reference_logprobs is not None for of in later)
        assert all(of.old_logprobs is None for of in later)


def test_tables_of_images_are_no_longer_than_a_row_s_groups_need(scene):
    """Two images a prompt at most; where prompts are not known yet, as many as patches make room for."""
    packing = {"shapes": ((320, 1, 512),), "groups": 3}
    (batch,) = minibatches(scene.items(order=[0, 2, 2]), layout := scene.layout(packing), scene.config)[0]
    assert layout.bounds.images == 3 * 2
    assert batch.batch().rows.vision.lengths.shape == (1, 6) and (batch.batch().rows.vision.lengths > 0).sum() == 4
    unknown = dataclasses.replace(layout, bounds=layout.bounds._replace(images=0))
    assert next(unknown.blanks(passes=True)).rows.vision.lengths.shape == (1, 512 // 4)


def test_targets_have_one_response_and_no_advantage(scene):
    config = copy.deepcopy(scene.config)
    config.packing.update({"shapes": ((112, 6, 64), (128, 6, 64)), "groups": 3})
    config.stages.perception.objective = "sft"
    (stage,) = schedule.stages(config)
    layout = Layout.of(stage, config, BUCKETS, scene.processor, scene.mesh, images=True)
    items = [target_item(prompt, samples[0].tokens) for prompt, samples, _ in scene.groups]
    (minibatch,) = minibatches(items, layout, config)
    batches = [micro.batch() for micro in minibatch]
    assert layout.bounds.group == 1 and not layout.scores
    assert all(b.responses.advantages is None and b.responses.sampler_logprobs is None for b in batches)
    tokens = sum(len(row.tokens) for item in items for row in item.rows)
    weights = np.concatenate([batch.responses.weights for batch in batches])
    assert sorted(set(weights.tolist())) == [0, np.float32(1 / tokens)] and (weights > 0).sum() == len(items)


@pytest.mark.parametrize(
    ("changes", "kinds", "fits"),
    [
        ({}, {}, False),
        ({"packing.shapes": ((320, 1, 64),)}, {}, True),
        ({"prompt.max_pixels": 48 * 4**2}, {}, True),
        ({"prompt.max_tokens": 12}, {}, True),
        ({}, {"images": False}, True),
        ({}, {"sizes": [PromptSize(20, (48,))]}, True),  # no prompt has a larger one
    ],
)
def test_rows_of_patches_hold_every_image_that_prompts_may_have(scene, changes, kinds, fits):
    """What a stage's data has is known when it begins; what the config allows, before."""
    config = copy.deepcopy(scene.config)
    config.packing.update({"shapes": ((320, 1, 48),), "groups": 4})
    config.update_from_flattened_dict({"prompt.max_pixels": 0, **changes})
    (stage,), buckets = schedule.stages(config), Buckets((96,), ((1, 16), (1, 64)))

    def made():
        return Layout.of(stage, config, buckets, scene.processor, scene.mesh, **{"images": True, **kinds})

    if fits:
        assert made().lengths == (320,)
        return
    message = r"the patches of config\.packing\.shapes = \(\(1, 48\),\): an image may have 64 .*max_pixels to 768$"
    with pytest.raises(InputError, match=message):
        made()


@pytest.mark.parametrize(
    ("packing", "updates", "message"),
    [
        ({}, 3, r"config\.stages\.perception\.prompts = 4 can't be split into 3 equal updates.*updates_per_batch"),
        (
            {"shapes": ((24, 6, 64), (32, 6, 64))},
            1,
            r"config\.packing\.shapes: the longest row has 32 tokens, .* response, \d+ ",
        ),
        ({"shapes": ((320, 6, 66),)}, 1, r"patches of config\.packing\.shapes = .* must be a multiple of 4"),
        (
            {"shapes": ((320, 1, 8),)},
            1,
            r"image of \d+ patches is longer than .*, which has 8: declare .* config\.packing\.shapes",
        ),
    ],
)
def test_what_can_t_be_packed_names_its_key(scene, packing, updates, message):
    with pytest.raises(InputError, match=message):
        scene.layout({**PACKINGS["one micro-batch"], **packing}, updates=updates)
