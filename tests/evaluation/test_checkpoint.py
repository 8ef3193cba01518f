"""A checkpoint is asked by the local engine: in batches, only what is wanted, each process its share."""

import json

import numpy as np
import pytest

from capcur_jax import presets
from capcur_jax.errors import InputError
from capcur_jax.evaluation import local
from capcur_jax.evaluation.asking import Replies, asked
from capcur_jax.evaluation.checkpoint import Checkpoint, config_of_run, plain_config, run_of
from capcur_jax.rollout.engine import Sample, Sampling
from tests.conftest import random_image
from tests.evaluation.asked import rows, tiny

GREEDY = Sampling(6, 0.0)


@pytest.fixture(scope="module")
def config():
    made = plain_config().copy_and_resolve_references().unlock()
    made.rollout.slots = 2  # batches of 8
    made.prompt.max_pixels = 1024
    return made.lock()


def questions(folder, count=10):
    made = rows(folder, count)
    return [asked(tiny(made), row, "suffix") for row in made]


def ask(checkpoint, config, folder, made, sampling=GREEDY, done=lambda answers: None):
    opened = Checkpoint(checkpoint, config, sampling, folder)
    with opened, Replies(folder / "tiny.jsonl", opened.settings, made) as replies:
        if any(wanted := replies.wanted()):
            opened.prepare(made)
            opened.answer(made, wanted, lambda answers: (replies.add(answers), done(answers)))
        return replies.said()


def test_all_rows_are_answered_and_a_stopped_command_goes_on(checkpoint, config, tmp_path, monkeypatch):
    made, asked_for = questions(tmp_path), []
    said = ask(checkpoint, config, tmp_path, made, done=lambda answers: asked_for.append(len(answers)))
    assert asked_for == [8, 2]
    assert all(not one.failed and one.tokens and one.finish in ("stop", "length") for one in said)
    assert any(one.finish == "length" for one in said)
    # Killed while the first batch was written: some of its lines are there, the last one cut.
    again = tmp_path / "again"
    again.mkdir()
    lines = (tmp_path / "tiny.jsonl").read_bytes().splitlines(keepends=True)
    (again / "tiny.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    asked_for.clear()
    assert ask(checkpoint, config, again, made, done=lambda answers: asked_for.append(len(answers))) == said
    assert asked_for == [5, 2]
    monkeypatch.setattr(Checkpoint, "prepare", None)  # nothing is loaded where nothing is wanted
    assert ask(checkpoint, config, again, made) == said


def test_a_sampled_answer_does_not_depend_on_where_it_was_stopped(checkpoint, config, tmp_path):
    made, sampling = questions(tmp_path), Sampling(6, 1.0)
    said = ask(checkpoint, config, tmp_path, made, sampling)
    again = tmp_path / "again"
    again.mkdir()
    lines = (tmp_path / "tiny.jsonl").read_bytes().splitlines(keepends=True)
    (again / "tiny.jsonl").write_bytes(b"".join(lines[:9]))  # settings and the first batch
    assert ask(checkpoint, config, again, made, sampling) == said


def test_what_does_not_fit_or_can_not_be_read_fails_alone(checkpoint, config, tmp_path):
    made = questions(tmp_path)
    (tmp_path / "2.webp").write_bytes(b"no picture")
    made[3] = made[3]._replace(parts=("word " * 600,))
    said = ask(checkpoint, config, tmp_path, made)
    failed = {at for at, one in enumerate(said) if one.failed}
    assert failed == {3} | {at for at, one in enumerate(made) if any("2.webp" in image for image in one.images)}
    assert "positions" in said[3].failed and len(failed) < 10


def test_rows_of_patches_are_no_longer_than_an_image_on_a_cpu(checkpoint, config, tmp_path):
    random_image(64, 64).save(tmp_path / "image.png")
    (made,) = questions(tmp_path, 1)
    with Checkpoint(checkpoint, config, GREEDY, tmp_path) as opened:
        opened.prepare([made._replace(parts=(*[tmp_path / "image.png"] * 3, "Which?"))])
        buckets = opened._engine.buckets
    assert {length for _, length in buckets.patches} == {128} and buckets.images.longest < 3 * 64
    assert buckets.most == 3 * config.rollout.prefill


def test_settings_name_what_answers_depend_on(checkpoint, untied_checkpoint, config, tmp_path):
    opened = Checkpoint(checkpoint, config, GREEDY, tmp_path).settings
    assert opened["max_pixels"] == 1024 and opened["engine"] == "local" and len(opened["checkpoint"]) == 16
    assert opened["dtype"] == config.model.dtype == "float32"
    served = config.copy_and_resolve_references().unlock()
    served.rollout.engine, served.rollout.sglang.addresses = "sglang", ("http://a:1",)
    made = Checkpoint(checkpoint, served, GREEDY, tmp_path).settings
    assert (made["engine"], made["dtype"]) == ("sglang", "bfloat16"), "servers compute in rollout.sglang.dtype"
    assert opened["checkpoint"] != Checkpoint(untied_checkpoint, config, GREEDY, tmp_path).settings["checkpoint"]
    with pytest.raises(InputError, match=r"config\.json"):
        Checkpoint(tmp_path, config, GREEDY, tmp_path)


def test_a_run_s_checkpoint_is_asked_with_the_run_s_config(checkpoint, tmp_path):
    made = presets.get("laptop")
    with made.unlocked():
        made.prompt.instruction, made.rollout.sglang.addresses = "system", ("http://a:1",)
        made.data.sets.own = {"source": "", "train": "mine.jsonl", "validation": "", "test": "test.jsonl"}
    (tmp_path / "config.json").write_text(json.dumps(made.to_dict() | {"key": "of another version"}))
    (tmp_path / "checkpoints").mkdir()
    assert run_of(tmp_path / "checkpoints" / "final") == tmp_path
    assert run_of(checkpoint) is None
    read = config_of_run(tmp_path)
    assert read.prompt.to_dict() == made.prompt.to_dict() and read.data.to_dict() == made.data.to_dict()
    assert read.rollout.sglang.addresses == ("http://a:1",) and read.rollout.slots == 80
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"--config=FILE"):
        config_of_run(tmp_path)


def test_processes_ask_shares_and_pass_over_what_is_known(monkeypatch):
    calls = []

    class Engine:
        def generate(self, prompts, sampling, n, seed, images):
            calls.append((prompts, seed))
            return [[Sample.whole(np.arange(1), np.zeros(1, np.float32), "stop", 0)] for _ in prompts]

    kinds = dict(engine=Engine(), build=lambda item: None if item == 5 else item, sampling=GREEDY, seed=3, batch=4)
    wanted = [item not in (1, 4, 6, 7) for item in range(11)]
    for process in range(2):
        monkeypatch.setattr("jax.process_count", lambda: 2)
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        found = list(local.answers(range(11), images=False, wanted=wanted, **kinds))
        assert [batch.size for batch in found] == [3, 1, 3]  # of all processes
        answered = [(item, sample is not None) for batch in found for item, sample in batch.answers]
        assert answered == [[(0, True), (3, True), (5, False), (8, True), (10, True)], [(2, True), (9, True)]][process]
    # Both make as many calls, with the same seeds: they sample together.
    assert calls == [([0, 3], 3), ([], 4), ([8, 10], 5), ([2], 3), ([], 4), ([9], 5)]
    assert list(local.answers(range(11), images=False, wanted=[False] * 11, **kinds)) == []
