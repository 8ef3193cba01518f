"""What every rollout engine keeps (rollout/engine.py): one set of tests, run against each of them.

A test class inherits from `Contract` and gives the fixture `scene` (tests/rollout/sglang/conftest.py's Served).
"""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from capcur_jax.models.batching import PromptSize
from capcur_jax.rollout.engine import Sampling

T, N = 12, 3


def moved(parameters, seed=1):
    """Other weights in both towers."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.03 * random.standard_normal(x.shape).astype(np.float32), parameters)


class Contract:
    @pytest.fixture(autouse=True)
    def weights(self, scene):
        """Each test starts from the same ones."""
        version = scene.engine.health().version + 1
        scene.engine.update_weights(scene.parameters, version)
        return version

    def test_samples_of_every_prompt_in_their_order(self, scene, weights):
        prompts = scene.prompts()
        order = [2, 0, 1, 0]
        groups = scene.engine.generate([prompts[i] for i in order], Sampling(T), N, 1)
        assert [len(group) for group in groups] == [N] * 4
        known = scene.processor
        for i, group in zip(order, groups, strict=True):
            for sample in group:
                assert sample.tokens.dtype == np.int32 and sample.logprobs.dtype == np.float32
                assert 1 <= len(sample.tokens) == len(sample.logprobs) <= T
                ends = np.isin(sample.tokens, known.end_tokens)
                assert not ends[:-1].any() and ends[-1] == (sample.finish == "stop")
                assert sample.finish == "stop" or (sample.finish == "length" and len(sample.tokens) == T)
                assert not np.isin(sample.tokens, known.banned_tokens).any()
                assert sample.spans == ((weights, 0, len(sample.tokens)),) and sample.version == weights
                want = scene.logprobs(scene.parameters, prompts[i], sample, Sampling(T))
                np.testing.assert_allclose(sample.logprobs, want, atol=1e-3)  # an order mixed up is off by nats
        assert len({sample.tokens.tobytes() for sample in (*groups[1], *groups[3])}) == 2 * N

    @pytest.mark.parametrize(
        "sampling",
        [Sampling(T, temperature=0.6, top_p=0.9), Sampling(T, temperature=0.0), Sampling(T, temperature=1.5, top_k=7)],
        ids=["top_p", "greedy", "top_k"],
    )
    def test_log_probs_are_over_the_full_softmax_at_the_temperature(self, scene, sampling):
        prompts = scene.prompts()
        for prompt, group in zip(prompts, scene.engine.generate(prompts, sampling, 2, 2), strict=True):
            for sample in group:
                want = scene.logprobs(scene.parameters, prompt, sample, sampling)
                np.testing.assert_allclose(sample.logprobs, want, atol=1e-3)

    def test_the_likeliest_of_one_is_the_greedy_answer(self, scene):
        prompts = scene.prompts()
        greedy = scene.engine.generate(prompts, Sampling(T, temperature=0.0), 1, 0)
        of_one = scene.engine.generate(prompts, Sampling(T, top_k=1), 1, 0)
        tiny = scene.engine.generate(prompts, Sampling(T, top_p=1e-6), 1, 0)
        for (a,), (b,), (c,) in zip(greedy, of_one, tiny, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() == c.tokens.tolist()

    def test_each_group_is_told_when_it_is_whole(self, scene):
        told = {}
        groups = scene.engine.generate(scene.prompts(), Sampling(T), N, 1, None, told.__setitem__)
        assert sorted(told) == list(range(len(groups)))
        for number, group in enumerate(groups):
            assert len(told[number]) == N and all(a is b for a, b in zip(told[number], group, strict=True))

    def test_a_single_token(self, scene):
        groups = scene.engine.generate(scene.prompts(), Sampling(1), N, 3)
        assert {len(sample.tokens) for group in groups for sample in group} == {1}

    def test_nothing_asked_nothing_answered(self, scene):
        assert scene.engine.generate([], Sampling(T), N, 0) == []

    def test_new_weights_make_every_sample_after_them(self, scene, weights):
        prompts, new = scene.prompts(), moved(scene.parameters)
        phases = scene.engine.update_weights(new, weights + 5)
        assert all(seconds >= 0 for seconds in phases.values())
        assert scene.engine.health().version == weights + 5
        for prompt, group in zip(prompts, scene.engine.generate(prompts, Sampling(T), 2, 4), strict=True):
            for sample in group:
                assert sample.version == weights + 5
                np.testing.assert_allclose(sample.logprobs, scene.logprobs(new, prompt, sample, Sampling(T)), atol=1e-3)
                old = scene.logprobs(scene.parameters, prompt, sample, Sampling(T))
                assert np.abs(sample.logprobs - old).max() > 1e-2

    def test_weights_of_which_a_part_stayed_the_same_arrays(self, scene, weights):
        """As a stage with frozen parameters has them: nothing of an older version is left over."""
        prompts = scene.prompts()
        first, second = moved(scene.parameters, 7), moved(scene.parameters, 8)
        flat = [
            (path, (dict(nnx.to_flat_state(first))[path]) if path[0] == "visual" else leaf)
            for path, leaf in nnx.to_flat_state(second)
        ]
        mixed = nnx.from_flat_state(flat)
        scene.engine.update_weights(first, weights + 1)
        scene.engine.update_weights(mixed, weights + 2)
        for prompt, (sample,) in zip(prompts, scene.engine.generate(prompts, Sampling(T), 1, 5), strict=True):
            np.testing.assert_allclose(sample.logprobs, scene.logprobs(mixed, prompt, sample, Sampling(T)), atol=1e-3)

    def test_it_says_what_it_does(self, scene, weights):
        scene.engine.warm_up([PromptSize.of(prompt) for prompt in scene.prompts()], Sampling(T), N)
        scene.engine.generate(scene.prompts(), Sampling(T), N, 6)
        health = scene.engine.health()
        assert (health.running, health.queued, health.version) == (0, 0, weights)
        assert health.tokens_per_second > 0 and health.alive == health.servers
        assert all(isinstance(count, int) for count in scene.engine.counters().values())

    def test_memory_is_given_away_and_taken_back(self, scene, weights):
        prompts = scene.prompts()
        greedy = Sampling(T, temperature=0.0)
        before = scene.engine.generate(prompts, greedy, 1, 0)
        scene.engine.release()
        scene.engine.resume()
        scene.engine.update_weights(scene.parameters, weights + 1)
        after = scene.engine.generate(prompts, greedy, 1, 0)
        for a, b in zip(*map(itertools.chain.from_iterable, (before, after)), strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() and b.version == weights + 1
