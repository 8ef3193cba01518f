"""What a step trains on: groups drawn again where they teach nothing, and what the record says of them."""

import json

import numpy as np
import pytest

from capcur_jax.data.loader import Example
from capcur_jax.data.problem import Problem
from capcur_jax.models.inputs import Prompt
from capcur_jax.rewards.reward import Score
from capcur_jax.rollout.collector import collect
from capcur_jax.rollout.engine import Sample
from capcur_jax.rollout.groups import Group, Rollout

G = 4
NONE = np.zeros(0, np.int32)
PROMPT = Prompt(np.arange(6, dtype=np.int32), NONE, 6, NONE, NONE, ((1, 2, 4),))  # an image of 8 patches


def group(number, rewards, lengths=(3, 1, 4, 1), capability="text", images=(), version=0):
    """A group whose samples have these rewards; at a length of 4 the limit cut them off."""
    samples = [
        Sample.whole(
            np.full(length, number, np.int32),
            np.zeros(length, np.float32),
            "length" if length == 4 else "stop",
            version,
        )
        for length in lengths
    ]
    scores = [Score(reward, float(reward > 0.5), float(reward > 0), str(reward), reward == 0.9) for reward in rewards]
    centred = np.float32(rewards) - np.float32(rewards).mean()
    problem = Problem(str(number), f"question {number}", "1", images, capability=capability)
    return Group(Example(problem, PROMPT, None), samples, [f"r{i}" for i in range(G)], scores, centred)


def drawer(*batches):
    """Batches of groups, "e" equal and "d" different; and the attempts that were asked for."""
    asked, number = [], iter(range(1000))

    def draw(attempt):
        asked.append(attempt)
        return [group(next(number), [0.1] * G if kind == "e" else [0, 0.1, 0.9, 1]) for kind in batches[attempt]]

    return draw, asked


def numbers(rollout):
    return [int(group.example.problem.id) for group in rollout.groups]


# ---------------------------------------------------------------------- dynamic sampling


def test_without_retries_everything_is_kept(monkeypatch):
    monkeypatch.setattr("capcur_jax.devices.distributed.agree", lambda flag: pytest.fail("no process waits"))
    draw, asked = drawer("edee")
    rollout = collect(draw, 4, 0)
    assert asked == [0] and numbers(rollout) == [0, 1, 2, 3]
    assert (rollout.drawn, rollout.dropped_equal) == (4, 0)


def test_groups_without_an_advantage_are_drawn_again_until_there_are_enough():
    draw, asked = drawer("edee", "eede", "dddd", "dddd")
    rollout = collect(draw, 4, 5)
    assert asked == [0, 1, 2] and numbers(rollout) == [1, 6, 8, 9]  # in the order drawn, what is over left out
    assert not any(group.equal for group in rollout.groups)
    assert (rollout.drawn, rollout.dropped_equal) == (12, 6)


def test_enough_at_once_is_not_drawn_again():
    draw, asked = drawer("dddd")
    assert numbers(collect(draw, 4, 3)) == [0, 1, 2, 3] and asked == [0]


@pytest.mark.parametrize("retries", [1, 2, 3])
def test_retries_are_bounded_and_what_is_missing_is_filled_without_advantage(retries):
    draw, asked = drawer("edee", "eeee", "eeee", "eeee")
    rollout = collect(draw, 4, retries)
    assert asked == list(range(1 + retries))
    assert numbers(rollout) == [1, 0, 2, 3]
    assert all(np.all(group.advantages == 0) for group in rollout.groups[1:])
    assert (rollout.drawn, rollout.dropped_equal) == (4 + 4 * retries, 4 * retries)


def test_all_processes_draw_as_long_as_one_lacks_groups(monkeypatch):
    """Drawing is collective: a process that has enough must not stop alone."""
    draw, asked = drawer("dddd", "dddd", "dddd")
    answers = iter([True, False])
    monkeypatch.setattr("capcur_jax.devices.distributed.agree", lambda flag: flag or next(answers))
    rollout = collect(draw, 4, 5)
    assert asked == [0, 1] and numbers(rollout) == [0, 1, 2, 3] and rollout.drawn == 8


# ---------------------------------------------------------------------- records


@pytest.fixture(scope="module")
def rollout():
    groups = [
        group(0, [0.0, 0.1, 0.9, 1.0], (3, 1, 4, 2), version=3),
        group(1, [1.0] * G, (2, 2, 2, 2), "visual"),
        group(2, [0.0] * G, (4, 4, 4, 1)),
        group(3, [0.1, 0.1, 0.1, 1.0], (1, 1, 4, 3), "visual"),
    ]
    return Rollout(groups, 12, 3, ("perception", "text", "visual"), version=5, renewed=2, tokens_per_second=70.0)


def test_metrics_are_those_of_numpy(rollout):
    metrics = rollout.metrics()
    rewards = np.array([[0.0, 0.1, 0.9, 1.0], [1.0] * 4, [0.0] * 4, [0.1, 0.1, 0.1, 1.0]])
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    lengths = np.array([[3, 1, 4, 2], [2] * 4, [4, 4, 4, 1], [1, 1, 4, 3]])
    want = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "reward_min": 0.0,
        "reward_max": 1.0,
        "advantage": 0.0,
        "advantage_std": advantages.std(),
        "advantage_min": advantages.min(),
        "advantage_max": advantages.max(),
        "advantage_positive": (advantages > 1e-6).mean(),
        "accuracy": (rewards > 0.5).mean(),
        "format": (rewards > 0).mean(),
        "response_length": lengths.mean(),
        "response_length/text": lengths[[0, 2]].mean(),
        "response_length/visual": lengths[[1, 3]].mean(),
        "truncated": (lengths == 4).mean(),
        "timed_out": 1 / 16,
        "equal_groups": 0.5,
        "right_groups": 0.25,
        "drawn_groups": 12,
        "refused_prompts": 0,
        "dropped_groups": 3,
        "renewed_groups": 2,
        "rollout_tokens_per_second": 70,
        "staleness": (2 + 3 * 5) / 4,
        "staleness_max": 5,
    }
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    # A capability that this step has none of says so rather than showing a length.
    assert set(metrics) == set(want)  # nothing is said of a capability without a group
    assert all(type(value) is float for value in metrics.values())


def test_metrics_of_several_processes_are_those_of_all_their_groups(rollout, monkeypatch):
    shared = {"capabilities": rollout.capabilities, "version": rollout.version}
    parts = [
        Rollout(rollout.groups[:1], 3, 1, renewed=2, tokens_per_second=30.0, **shared),
        Rollout(rollout.groups[1:], 9, 2, tokens_per_second=40.0, **shared),
    ]
    given = [[], []]
    for part, kept in zip(parts, given, strict=True):
        monkeypatch.setattr("capcur_jax.devices.distributed.exchange", lambda values, kept=kept: _kept(kept, values))
        part.metrics()
    together = iter([np.stack(values) for values in zip(*given, strict=True)])
    monkeypatch.setattr("capcur_jax.devices.distributed.exchange", lambda values: next(together))
    found = parts[0].metrics()
    monkeypatch.undo()
    assert found == pytest.approx(rollout.metrics(), rel=1e-5, abs=1e-6, nan_ok=True)


def _kept(kept, values):
    kept.append(np.asarray(values))
    return kept[-1][None]


def test_shown_groups_are_plain_records_with_images_from_the_work_directory(rollout, tmp_path):
    groups = [group(7, [0.0, 0.1, 0.9, 1.0], images=(str(tmp_path / "data" / "a.png"),)), *rollout.groups]
    lines = Rollout(groups, 5, 0).shown(2, tmp_path / "run")
    assert [line["prompt_tokens"] for line in lines] == [6, 6] and lines[0]["image_patches"] == [8]
    assert [line["id"] for line in lines] == ["7", "0"] and lines[0]["images"] == ["../data/a.png"]
    assert json.loads(json.dumps(lines)) == lines
    samples = lines[0]["samples"]
    assert [s["reward"] for s in samples] == [0.0, 0.1, 0.9, 1.0] and [s["tokens"] for s in samples] == [3, 1, 4, 1]
    assert [s["finish"] for s in samples] == ["stop", "stop", "length", "stop"]
    assert [s["timed_out"] for s in samples] == [False, False, True, False]
    assert [s["response"] for s in samples] == ["r0", "r1", "r2", "r3"]
    assert sum(s["advantage"] for s in samples) == pytest.approx(0, abs=1e-6)
