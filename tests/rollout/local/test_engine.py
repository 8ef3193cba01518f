"""The local engine on a real tiny Qwen3-VL: what is sampled, what is reported about it, and on what it depends."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capcur_jax import presets
from capcur_jax.errors import InputError
from capcur_jax.learner.learner import Learner
from capcur_jax.learner.packing import Responses, UpdateBatch
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.models.packed_rows import RowShape
from capcur_jax.records import metrics
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.local import call as local
from capcur_jax.rollout.local import sampling as sampling_lib
from capcur_jax.rollout.local.engine import LocalEngine
from tests.conftest import random_image
from tests.packed import packed

ROWS, G, T = 12, 3, 10
BUCKETS = Buckets((160, 256), ((4, 96),), longest=64)
WARM, COOL, GREEDY = Sampling(T), Sampling(T, temperature=0.7), Sampling(T, temperature=0.0)
# ---------------------------------------------------------------------- choosing a token


def _draw(logits, sampling, draws=20_000):
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    tokens, logprobs = jax.jit(sampling_lib.sample_tokens, static_argnums=2)(rows, keys, sampling)
    return np.bincount(tokens, minlength=len(logits)), np.asarray(tokens), np.asarray(logprobs)


def _log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum())


LOGITS = [2.0, -1.0, 0.5, 0.0, 1.2, -0.3, 0.9, 0.1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature):
    counts, tokens, logprobs = _draw(LOGITS, Sampling(1, temperature))
    want = _log_softmax(np.array(LOGITS) / temperature)
    expected = counts.sum() * np.exp(want)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom: 99.9 %
    np.testing.assert_allclose(logprobs, want[tokens], atol=1e-6)


def test_temperature_zero_takes_the_likeliest_and_reports_temperature_one():
    counts, _, logprobs = _draw(LOGITS, Sampling(1, 0.0), draws=100)
    assert counts[0] == 100
    np.testing.assert_allclose(logprobs, _log_softmax(LOGITS)[0], atol=1e-6)


def test_top_p_draws_the_nucleus_in_proportion_and_reports_the_full_softmax():
    counts, tokens, logprobs = _draw(LOGITS, Sampling(1, 1.0, top_p=0.7))
    want = _log_softmax(LOGITS)
    # 0.44 + 0.20 + 0.15 (tokens 0, 4, 6) is the smallest set of 0.7.
    assert set(np.flatnonzero(counts)) == {0, 4, 6}
    share = np.exp(want[[0, 4, 6]])
    expected = counts.sum() * share / share.sum()
    assert ((counts[[0, 4, 6]] - expected) ** 2 / expected).sum() < 13.8  # 2 degrees of freedom: 99.9 %
    np.testing.assert_allclose(logprobs, want[tokens], atol=1e-6)


def _kept(probabilities, top_p=1.0, top_k=0):
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(probabilities, np.float32))
    kept = sampling_lib.allowed(jnp.asarray(logits)[None], Sampling(1, top_p=top_p, top_k=top_k))
    return list(np.flatnonzero(np.isfinite(kept[0])))


def test_nucleus_is_the_smallest_set_that_reaches_the_mass():
    shares = [0.1, 0.4, 0.2, 0.3]
    assert [_kept(shares, p) for p in (0.01, 0.39, 0.5, 0.8, 0.95)] == [[1], [1], [1, 3], [1, 2, 3], [0, 1, 2, 3]]


def test_nucleus_keeps_all_ties_of_its_last_member_and_never_empties():
    assert _kept([0.4, 0.2, 0.2, 0.2], 0.5) == [0, 1, 2, 3]
    assert _kept([0.25] * 4, 1e-6) == [0, 1, 2, 3]
    assert _kept([0.0, 1.0, 0.0, 0.0], 1e-6) == [1]
    assert _kept([0.0, 0.5, 0.5, 0.0], 0.999) == [1, 2]  # banned tokens (-inf) stay out


def test_top_k_comes_before_top_p():
    shares = [0.1, 0.4, 0.2, 0.3]
    assert [_kept(shares, top_k=k) for k in (0, 1, 2, 4, 9)] == [[0, 1, 2, 3], [1], [1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert _kept(shares, 0.5, 2) == [1]  # 0.4 of the 0.7 that are left
    assert _kept(shares, 0.6, 2) == [1, 3]


@pytest.mark.parametrize("vocabulary", [3, 64, 65, 300])
def test_a_draw_inverts_the_cumulated_mass(vocabulary):
    """Over several blocks, with tokens of no probability, at both ends of the uniform number."""
    random = np.random.default_rng(vocabulary)
    logits = np.where(random.random(vocabulary) < 0.3, -np.inf, random.normal(size=vocabulary)).astype(np.float32)
    logits[1] = 0.5
    uniform = np.concatenate([[0.0, 1 - 2**-23], random.random(500)]).astype(np.float32)
    drawn = np.asarray(sampling_lib.draw(jnp.tile(logits, (len(uniform), 1)), jnp.asarray(uniform)))
    shares = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    until = np.cumsum(shares)
    assert (shares[drawn] > 0).all()
    assert (until[drawn] >= uniform - 1e-6).all() and (until[drawn] - shares[drawn] <= uniform + 1e-6).all()
    possible = np.flatnonzero(shares)
    assert drawn[0] == possible[0] and drawn[1] == possible[-1]


def test_nucleus_leaves_the_logits_of_its_members_as_they_are():
    random = jnp.asarray(np.random.default_rng(0).normal(size=(50, 30)), jnp.float32)
    kept = np.asarray(sampling_lib.allowed(random, Sampling(1, top_p=0.6)))
    inside = np.isfinite(kept)
    np.testing.assert_array_equal(kept[inside], np.asarray(random)[inside])
    shares = np.asarray(jax.nn.softmax(random, axis=-1))
    mass = np.where(inside, shares, 0).sum(1)
    least = np.where(inside, shares, 1).min(1)
    assert (mass >= 0.6 - 1e-6).all() and (mass - least < 0.6).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -0.5}, "temperature = -0.5.*0 \\(greedy\\)"),
        ({"top_p": 0.0}, r"top_p = 0.0; it must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p = 1.5"),
    ],
)
def test_impossible_sampling_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 5, **given})


# ---------------------------------------------------------------------- a model that answers


@pytest.fixture(scope="module")
def prompts(processor):
    """Text, odd images, two images: six prompts, so that the second batch of four is short."""
    texts = ["What shape is in the image?", "3 x 4", "The shape is", "boxed", "a red circle", "x"]
    images = [[], [random_image(23, 37)], [], [random_image(18, 25, 1), random_image(20, 20, 2)], [], []]
    images[5] = [random_image(30, 17, 3)]
    return [
        processor.prepare(processor.render([None] * len(shown) + [text]), shown)
        for text, shown in zip(texts, images, strict=True)
    ]


@pytest.fixture(scope="module")
def graph(model):
    return nnx.split(model)[0]


@pytest.fixture(scope="module")
def parameters(model):
    return nnx.split(model)[1]


@pytest.fixture(scope="module")
def shared(model, processor):
    return LocalEngine(model, processor, slots=ROWS, prefill=ROWS // G, buckets=BUCKETS)


@pytest.fixture
def engine(shared, parameters):
    """One engine, so that programs are compiled once; each test starts from the same weights."""
    shared.update_weights(parameters, 0)
    return shared


def same(a, b):
    return all(
        np.array_equal(x.tokens, y.tokens) and np.array_equal(x.logprobs, y.logprobs)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("sampling", [WARM, COOL], ids=["1.0", "0.7"])
def test_log_probs_equal_the_trainer_s(engine, sampling, prompts, parameters, graph, processor):
    """Of the same tokens, text and image prompts in one batch, decoded one by one here and in one pass there."""
    learner = Learner(
        graph,
        parameters,
        objective="grpo",
        freeze="",
        config=presets.laptop(),
        temperature=sampling.temperature,
        banned=processor.banned_tokens,
        mesh=engine.mesh,
    )
    groups = engine.generate(prompts[:4], sampling, G, seed=3)
    samples = [sample for group in groups for sample in group]
    rows = packed(prompts[:4], [sample.tokens for sample in samples], processor, 96)
    batch = UpdateBatch(rows, Responses.of(np.zeros(len(samples), np.float32)))
    scored = learner.score(*learner.split(parameters), batch)
    for sample, row in zip(samples, np.asarray(scored), strict=True):
        np.testing.assert_allclose(sample.logprobs, row[: len(sample.tokens)], atol=1e-5)


def test_samples_have_the_declared_shape(engine, prompts, processor):
    groups = engine.generate(prompts, WARM, G, seed=4)
    assert [len(group) for group in groups] == [G] * 6
    for sample in (sample for group in groups for sample in group):
        assert sample.tokens.dtype == np.int32 and sample.logprobs.dtype == np.float32
        assert 1 <= len(sample.tokens) == len(sample.logprobs) <= T
        assert (sample.finish == "stop") == (sample.tokens[-1] in processor.end_tokens)
        assert sample.finish in ("stop", "length") and (sample.finish == "stop" or len(sample.tokens) == T)
        assert not np.isin(sample.tokens, processor.banned_tokens).any() and (sample.logprobs < 0).all()
    assert any(sample.finish == "length" for group in groups for sample in group)


@pytest.fixture(scope="module")
def biased(parameters, processor):
    """Weights with which the tokens that are banned have by far the largest logits, and end tokens come often."""
    embedding = np.array(parameters["text"]["embed"]["embedding"][...])
    embedding[:, 0] += 20.0  # a direction that every hidden state has
    embedding[list(processor.banned_tokens), 0] += 4.0
    embedding[list(processor.end_tokens), 0] += 0.35
    scale = np.array(parameters["text"]["norm"]["scale"][...])
    scale[0] = 2.0
    changed = jax.tree.map(jnp.copy, parameters)
    changed["text"]["embed"]["embedding"][...] = jnp.asarray(embedding)
    changed["text"]["norm"]["scale"][...] = jnp.asarray(scale)
    return changed


def test_banned_tokens_are_never_sampled_though_likeliest(engine, biased, graph, prompts, processor):
    batch = BUCKETS.collate([prompts[:4]], RowShape(256, 4, 96), 4, processor.config, processor.pad_token)
    model = nnx.merge(graph, biased)
    logits = jax.jit(lambda b: model.logits(model.last(model.prefill(b)[0], b)))(batch)[0]
    banned = list(processor.banned_tokens)

    assert jax.nn.softmax(logits, axis=-1)[:, banned].sum(-1).min() > 0.9
    engine.update_weights(biased, 1)
    for sampling in (WARM, GREEDY):
        for group in engine.generate(prompts, sampling, G, seed=5):
            for sample in group:
                assert not np.isin(sample.tokens, banned).any() and np.isfinite(sample.logprobs).all()


def test_a_row_ends_at_either_end_token(engine, biased, prompts, processor):
    engine.update_weights(biased, 1)
    samples = [sample for seed in range(3) for group in engine.generate(prompts, WARM, G, seed) for sample in group]
    stopped = [sample for sample in samples if sample.finish == "stop"]
    assert {int(sample.tokens[-1]) for sample in stopped} == set(processor.end_tokens)
    for sample in samples:  # the end token counts, and nothing comes after it
        ends = np.flatnonzero(np.isin(sample.tokens, processor.end_tokens))
        assert list(ends) == ([len(sample.tokens) - 1] if sample.finish == "stop" else [])
    assert len({len(sample.tokens) for sample in stopped}) > 3


def test_samples_of_a_prompt_differ_unless_greedy(engine, prompts):
    for group in engine.generate(prompts, WARM, G, seed=6):
        assert len({sample.tokens.tobytes() for sample in group}) == G
    for group in engine.generate(prompts, GREEDY, G, seed=6):
        assert len({sample.tokens.tobytes() for sample in group}) == 1


def test_the_seed_decides(engine, prompts):
    first = engine.generate(prompts, WARM, G, seed=7)
    assert same(first, engine.generate(prompts, WARM, G, seed=7))
    other = engine.generate(prompts, WARM, G, seed=8)
    assert not any(same([a], [b]) for a, b in zip(first, other, strict=True))
    greedy = engine.generate(prompts, GREEDY, G, seed=7)
    assert same(greedy, engine.generate(prompts, GREEDY, G, seed=8))


def assert_as_before(drawn, whole):
    """The same tokens; log-probs but for the places of their keys in the ring, in whose order they are summed."""
    for sample, before in zip(*map(itertools.chain.from_iterable, (drawn, whole)), strict=True):
        np.testing.assert_array_equal(sample.tokens, before.tokens)
        np.testing.assert_allclose(sample.logprobs, before.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("slots", "prefill", "gathered"), [(12, 4, False), (7, 1, True), (3, 2, False)])
def test_what_is_sampled_depends_on_no_slot(engine, model, processor, biased, prompts, slots, prefill, gathered):
    """Fewer slots than responses: those that become free are given away, and every response is what it was."""
    engine.update_weights(biased, 3)
    whole = engine.generate(prompts, WARM, G, seed=11)
    assert len({len(sample.tokens) for group in whole for sample in group}) > 3
    other = LocalEngine(model, processor, slots=slots, prefill=prefill, buckets=BUCKETS, gathered=gathered)
    other.update_weights(biased, 3)
    drawn = other.generate(prompts, WARM, G, seed=11)
    assert_as_before(drawn, whole)
    assert all(sample.spans == ((3, 0, len(sample.tokens)),) for group in drawn for sample in group)


def test_too_few_pages_for_a_response_are_refused_before_any_is_drawn(model, processor, prompts):
    engine = LocalEngine(model, processor, slots=4, buckets=BUCKETS, page=8, pages=9)
    with pytest.raises(
        InputError, match=r"config\.rollout\.pages = 9: a prompt and a response of 74 tokens need 10 pages"
    ):
        engine.warm_up([PromptSize.of(prompts[0])], WARM, G)


def test_groups_are_told_while_others_are_decoded(model, processor, biased, prompts, monkeypatch):
    events, decode = [], local.Call.decode
    monkeypatch.setattr(local.Call, "decode", lambda call, *rest: events.append("decode") or decode(call, *rest))
    engine = LocalEngine(model, processor, slots=G, prefill=1, buckets=BUCKETS)
    engine.update_weights(biased, 1)
    groups = engine.generate(prompts, WARM, G, 5, None, lambda number, samples: events.append(number))
    numbers = [event for event in events if event != "decode"]
    assert sorted(numbers) == list(range(len(groups)))
    for number in numbers[:-1]:  # slots for one group: the next one is decoded afterwards
        assert "decode" in events[events.index(number) :]


def test_no_response_waits_for_the_longest(model, processor, biased, prompts):
    """With m slots and one prompt taken at a time, the steps stay within those of any schedule that is never idle."""
    engine = LocalEngine(model, processor, slots=4, prefill=1, buckets=BUCKETS)
    engine.update_weights(biased, 1)
    many = [prompts[i % 6] for i in range(20)]
    call = local.Call(engine, WARM, many, 1, 5, None)
    most = 0
    while call.places.unfinished():
        call.admit()
        most = max(most, int((call.places.running >= 0).sum()))
        call.decode()
    health = call.health()
    lengths = [len(sample.tokens) for group in call.groups() for sample in group]
    lockstep = sum(max(lengths[at : at + 4]) for at in range(0, 20, 4))
    assert sum(lengths) / 4 <= call.steps <= sum(lengths) / 4 + max(lengths) < lockstep
    assert most == 4 and (health.running, health.queued, health.version) == (0, 0, 1) and health.tokens_per_second > 0
    assert [g[0].tokens.tolist() for g in engine.generate(many, WARM, 1, 5)] == [
        g[0].tokens.tolist() for g in call.groups()
    ]


def test_more_steps_than_the_host_waits_for_lose_nothing(engine, model, processor, prompts):
    whole = engine.generate(prompts, WARM, G, seed=2)
    often = LocalEngine(model, processor, slots=ROWS, prefill=ROWS // G, buckets=BUCKETS, burst=3)
    assert_as_before(often.generate(prompts, WARM, G, seed=2), whole)


@pytest.mark.parametrize(("slots", "page", "pages"), [(12, 4, 0), (12, 8, 19), (7, 16, 10), (40, 8, 30)])
def test_what_is_sampled_depends_on_no_page(engine, model, processor, biased, prompts, slots, page, pages):
    """Small pages, which responses share their prompt's of; and so few that some responses must wait."""
    engine.update_weights(biased, 3)
    many = [*prompts, *prompts]
    whole = engine.generate(many, WARM, G, seed=11)
    other = LocalEngine(model, processor, slots=slots, prefill=4, buckets=BUCKETS, page=page, pages=pages, burst=4)
    other.update_weights(biased, 3)
    assert_as_before(other.generate(many, WARM, G, seed=11), whole)
    assert (other.counters()["evicted"] > 0) == (pages == 19)


def test_batches_of_a_call_draw_different_samples(engine, prompts):
    groups = engine.generate([prompts[0]] * 8, WARM, G, seed=9)
    assert len({sample.tokens.tobytes() for group in groups for sample in group}) == 8 * G


def test_a_greedy_answer_does_not_depend_on_its_company(engine, prompts):
    together = engine.generate(prompts, GREEDY, G)
    assert len({group[0].tokens.tobytes() for group in together}) > 1
    for order in ([5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 3, 0]):
        for place, group in zip(order, engine.generate([prompts[i] for i in order], GREEDY, G), strict=True):
            assert np.array_equal(group[0].tokens, together[place][0].tokens)
    alone = engine.generate([prompts[1]], GREEDY, G)
    assert len(alone) == 1 and np.array_equal(alone[0][0].tokens, together[1][0].tokens)


def test_a_greedy_answer_does_not_depend_on_the_padding(engine, prompts, processor):
    long = processor.prepare(processor.render([None, "What shape is in the image? " * 5]), [random_image(20, 20)])
    narrow, wide = prompts[:3], [*prompts[:2], long, long, long]
    assert sum(map(len, narrow)) <= BUCKETS.tokens[0] < len(prompts[1]) + 3 * len(long)
    narrow, wide = (engine.generate(row, GREEDY, G) for row in (narrow, wide))
    for a, b in zip(narrow[:2], wide[:2], strict=True):
        assert np.array_equal(a[0].tokens, b[0].tokens)
        np.testing.assert_allclose(a[0].logprobs, b[0].logprobs, atol=1e-5)


def test_an_image_is_seen(engine, prompts, processor):
    text = processor.render([None, "3 x 4"])
    other = processor.prepare(text, [random_image(23, 37, seed=9)])
    assert np.array_equal(other.tokens, prompts[1].tokens)
    a, b = engine.generate([prompts[1], other], GREEDY, G)
    assert np.abs(a[0].logprobs[0] - b[0].logprobs[0]) > 1e-4


def test_new_weights_are_used_and_their_version_is_on_every_sample(engine, parameters, prompts):
    before = engine.generate(prompts, GREEDY, G)
    assert {sample.version for group in before for sample in group} == {0}
    random = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), parameters)
    engine.update_weights(moved, 41)
    after = engine.generate(prompts, GREEDY, G)
    assert {sample.version for group in after for sample in group} == {41}
    assert not any(same([a], [b]) for a, b in zip(before, after, strict=True))
    engine.update_weights(parameters, 42)
    assert same(before, engine.generate(prompts, GREEDY, G))


def test_a_warmed_up_engine_does_not_compile(engine, prompts):
    short = dataclasses.replace(WARM, max_new_tokens=3)
    sizes = [PromptSize.of(prompt) for prompt in prompts]
    with metrics.CompilationCounter() as counter:
        engine.warm_up(sizes, short, G)
        assert counter.count == 3  # empty slots, prefill, decoding
        groups = engine.generate(prompts, short, G, seed=1)
        engine.warm_up(sizes, short, G)
        assert counter.count == 3
    assert max(len(sample.tokens) for group in groups for sample in group) == 3


def test_a_call_without_images_takes_the_program_of_those_with_images(engine, prompts):
    text = [prompt for prompt in prompts if not prompt.grids]
    short = dataclasses.replace(GREEDY, max_new_tokens=4)
    sizes = [PromptSize.of(prompt) for prompt in prompts]
    with metrics.CompilationCounter() as counter:
        engine.warm_up(sizes, short, G, images=True)
        engine.warm_up([PromptSize.of(prompt) for prompt in text], short, G, images=True)
        warmed = counter.count
        with_tower = engine.generate(text, short, G, images=True)
        assert counter.count == warmed
        without = engine.generate(text, short, G)
        assert counter.count == warmed + 1  # a program without a vision tower
    for a, b in zip(with_tower, without, strict=True):
        assert np.array_equal(a[0].tokens, b[0].tokens)


def test_a_row_with_room_for_more_prompts_draws_the_same(engine, prompts):
    """Two images in one prompt, alone in a row for four."""
    ((sample, *_),) = engine.generate([prompts[3]], GREEDY, G)
    together = engine.generate(prompts, GREEDY, G)
    assert np.array_equal(sample.tokens, together[3][0].tokens)


@pytest.mark.parametrize("row", [40, 64])
def test_prompts_that_a_row_has_no_tokens_for_come_in_the_next_prefill(model, processor, biased, prompts, row):
    whole, tight = (
        LocalEngine(model, processor, slots=ROWS, prefill=ROWS // G, buckets=buckets)
        for buckets in (BUCKETS, dataclasses.replace(BUCKETS, tokens=(row,)))
    )
    drawn = []
    for engine in (whole, tight):
        engine.update_weights(biased, 3)
        drawn.append(engine.generate(prompts, WARM, G, seed=11))
    assert sum(map(len, prompts[:4])) > row
    assert_as_before(drawn[1], drawn[0])


def test_a_group_larger_than_the_slots_still_gets_its_samples(engine, prompts):
    assert [engine.work(n, WARM).prompts for n in (1, 3, 5, 12, 50)] == [4, 4, 2, 1, 1]
    groups = engine.generate(prompts[:2], dataclasses.replace(WARM, max_new_tokens=2), ROWS + 1)
    assert [len(group) for group in groups] == [ROWS + 1] * 2
    assert engine.generate([], WARM, G) == []
