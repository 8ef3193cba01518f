"""What a plan computes with: drawn and recorded lengths, and what a step makes of them."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from capcur_jax import presets, schedule
from capcur_jax.errors import InputError
from capcur_jax.learner import packing
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.minibatches import Micro
from capcur_jax.models.batching import Buckets, PromptSize
from capcur_jax.models.packed_rows import RowShape
from capcur_jax.plan import lengths, work
from capcur_jax.records.jsonl import JsonLines
from capcur_jax.rollout.local.places import Pool

PAPER = presets.get("qwen3_vl_8b")
VISUAL = next(stage for stage in schedule.stages(PAPER) if stage.name == "visual")


def recorded(path: Path, groups, stage: str = "text") -> Path:
    """A run's record of such groups (prompt tokens, responses' lengths), without the rest of what a record has."""
    with JsonLines(path) as log:
        for tokens, responses in groups:
            samples = [{"tokens": n} for n in responses]
            log.write({"stage": stage, "prompt_tokens": tokens, "image_patches": [4], "samples": samples})
    return path


# ---------------------------------------------------------------------- lengths


@pytest.mark.parametrize(("name", "prompt", "image", "response"), [
    ("paper", 696, 564, 529), ("mathvision", 1109, 1003, 389), ("geo3k", 409, 288, 339), ("text", 192, 0, 680),
])  # fmt: skip
def test_named_lengths(name, prompt, image, response):
    groups = lengths.of(name, PAPER, 2)(VISUAL, True)
    assert len(groups) == 512 and {len(responses) for _, responses in groups} == {5}
    assert np.mean([size.tokens for size, _ in groups]) == pytest.approx(prompt, rel=0.02)
    assert np.mean([sum(size.images) for size, _ in groups]) == pytest.approx(4 * image, rel=0.02)
    drawn = np.array([responses for _, responses in groups])
    assert drawn.mean() == pytest.approx(response, rel=0.02) and drawn.min() >= 1
    assert drawn.max() <= PAPER.rollout.max_new_tokens
    assert groups == lengths.of(name, PAPER, 2)(VISUAL, True)  # the same each time


def test_a_stage_without_images_has_texts():
    groups = lengths.of("paper", PAPER, 2)(VISUAL, False)
    assert groups == lengths.of("text", PAPER, 2)(VISUAL, True) and not any(size.images for size, _ in groups)


def test_recorded_lengths(tmp_path):
    groups = [(30, [1, 2, 3, 4, 5]), (40, [9, 9, 9, 9, 5000])]
    file = recorded(tmp_path / "rollouts.jsonl", groups, "visual")
    drawn = lengths.of(str(tmp_path), PAPER, 2)(VISUAL, True)
    assert drawn == lengths.of(str(file), PAPER, 2)(VISUAL, True) and len(drawn) == 512
    assert {size for size, _ in drawn} == {PromptSize(30, (4,)), PromptSize(40, (4,))}
    known = {30: [1, 2, 3, 4, 5], 40: [9, 9, 9, 9, PAPER.rollout.max_new_tokens]}
    assert all(sorted(responses) == known[size.tokens] for size, responses in drawn)


@pytest.mark.parametrize(("content", "message"), [
    ('{"stage": "visual", "samples": []}\n', "rollouts.jsonl:1 has no prompt_tokens"),
    ('{"stage": "a", "prompt_tokens": 3, "image_patches": [], "samples": []}\n', "has stages a, none called visual"),
    ('{"stage": "text", "prompt_tokens": 3}\n', "is no rollouts.jsonl: 'image_patches'"),
    ("hm\nhm\n", "is no rollouts.jsonl: "),
    ("", "has no rollouts"),
])  # fmt: skip
def test_records_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "rollouts.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        lengths.of(str(tmp_path), PAPER, 2)(VISUAL, True)


# ---------------------------------------------------------------------- work


def paper_step(groups):
    prompt, mesh = PAPER.prompt, AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))
    buckets = Buckets(prompt.token_buckets, prompt.patch_buckets)
    known = types.SimpleNamespace(vision=types.SimpleNamespace(merge_size=2))
    processor = types.SimpleNamespace(config=known)
    layout = Layout.of(VISUAL, PAPER, buckets, processor, mesh, True)
    return buckets, [micro for update in work.updates(groups, layout) for micro in update]


@pytest.fixture(scope="module")
def paper():
    return lengths.of("paper", PAPER, 2)(VISUAL, True)


def test_the_trainers_packing_is_what_is_counted(paper):
    _, micros = paper_step(paper)
    slots = [micro.slots() for micro in micros]
    shares = packing.shares(sum(slots))
    real = sum(size.tokens + sum(responses) for size, responses in paper)
    assert sum(each[0] for each in slots) == real == work.useful(paper).tokens
    assert sum(each[3] for each in slots) == work.useful(paper).patches
    assert 16 <= len(micros) <= 24 and 0 < shares["token_padding"] < 0.06 and 0 < shares["patch_padding"] < 1
    assert all(work.tokens(micro) == each[1] for micro, each in zip(micros, slots, strict=True))


def test_the_samplers_slots_are_what_is_counted(paper):
    buckets, _ = paper_step(paper)
    few = work.Slots(24, 1, Pool(24 * 32, 128))
    found = work.sampled(paper, buckets, 8, few, 2048, images=True)
    drawn = np.array([responses for _, responses in paper])
    assert 64 <= len(found.admissions) <= 512 and found.evicted == 0
    assert 8 * sum(rows * steps for rows, steps in found.bursts) >= drawn.sum() - drawn.size  # firsts come of prefills
    assert sum(pairs for _, pairs in found.admissions) == sum(size.tokens**2 / 2 for size, _ in paper)
    # With a slot for every response all start at once, and the longest ends the step.
    buckets = dataclasses.replace(buckets, tokens=(2**16,), patches=((1, 2**18),))
    whole = work.sampled(paper, buckets, 8, work.Slots(320, 64, Pool(320 * 32, 128)), 2048, images=True)
    assert (len(whole.admissions), whole.steps) == (1, drawn.max() - 1)
    assert [rows for rows, _ in whole.bursts] == sorted((rows for rows, _ in whole.bursts), reverse=True)
    # Each token of a response reads its prompt and all before it, and itself.
    prompts = np.array([size.tokens for size, _ in paper])[:, None]
    assert whole.live == ((drawn - 1) * (prompts + 1) + (drawn - 1) * (drawn - 2) / 2).sum() / 8
    # Rows are full but for the last prefill's: of what is computed few tokens are padding.
    usual = work.sampled(paper, paper_step(paper)[0], 8, work.Slots(320, 16, Pool(320 * 32, 128)), 2048, images=True)
    computed = 8 * sum(shape.length for shape, _ in usual.admissions)
    assert 1 <= computed / sum(size.tokens for size, _ in paper) < 1.2 and len(usual.admissions) <= 8
    # With few pages some responses wait, and all the same end.
    short = work.sampled(paper, buckets, 8, work.Slots(320, 64, Pool(1200, 128)), 2048, images=True)
    assert short.evicted > 0 and short.steps > whole.steps


def test_useful_work_by_hand():
    useful = work.useful([(PromptSize(10, (4, 8)), [2, 4]), (PromptSize(6), [1, 1])])
    assert useful[:5] == (24, 16, 8, 10 * 2 + 6 + 6 * 2 + 2, 12)
    assert useful.pairs == 50 + 18 + (20 + 2) + (40 + 8) + 2 * (6 + 0.5) and useful.patch_pairs == 16 + 64


def test_pairs_of_a_micro_batch_by_hand(paper):
    items = work.items_of([(PromptSize(10), [4, 2]), (PromptSize(6), [1])])
    micro = Micro(None, RowShape(64), [items[:1], items[1:]])
    assert work.pairs(micro) == 50 + (40 + 8) + (20 + 2) + 18 + (6 + 0.5) and work.tokens(micro) == 128
    _, micros = paper_step(paper)
    assert sum(map(work.pairs, micros)) == pytest.approx(work.useful(paper).pairs)
