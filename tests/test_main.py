"""The main job on a tiny random model: everything that a run writes, and what it says when something is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from capcur_jax import presets
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import write_rows
from capcur_jax.errors import InputError, RolloutError
from capcur_jax.learner import objectives
from capcur_jax.models import huggingface
from capcur_jax.records.jsonl import read_jsonl
from capcur_jax.records.lock import Lock
from capcur_jax.train import train
from tests import tiny
from tests.conftest import random_image

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[1]


class ReadKeys:
    """Records which keys of a ConfigDict are read; writing it out whole (config.json) does not count."""

    def __init__(self, config: ConfigDict):
        self.root, self.read, self._muted = config, set(), False

    @contextlib.contextmanager
    def recording(self, monkeypatch):
        get, to_dict = ConfigDict.__getitem__, ConfigDict.to_dict

        def recorded(this, key):
            if not self._muted:
                self.read.add((id(this), key))
            return get(this, key)

        def whole(this, *args, **kwargs):
            if self._muted:
                return to_dict(this, *args, **kwargs)
            if this is not self.root:  # a stage handed over as keyword arguments: all its keys are taken
                self.read.update((id(this), key) for key in this.keys())
            self._muted = True
            try:
                return to_dict(this, *args, **kwargs)
            finally:
                self._muted = False

        with monkeypatch.context() as patch:
            patch.setattr(ConfigDict, "__getitem__", recorded)
            patch.setattr(ConfigDict, "to_dict", whole)
            yield

    def unread(self, node=None, path="config") -> list[str]:
        node = self.root if node is None else node
        lines = []
        for key, value in node.items():
            if isinstance(value, ConfigDict) and len(value):
                lines += self.unread(value, f"{path}.{key}")
            elif (id(node), key) not in self.read:
                lines.append(f"{path}.{key}")
        return lines


@pytest.fixture(scope="module")
def finished(checkpoint, sets, tmp_path_factory):
    """One run of two stages, its summary, and the config keys that nothing read."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny.config(checkpoint, sets)
    keys = ReadKeys(config)
    with pytest.MonkeyPatch.context() as monkeypatch, keys.recording(monkeypatch):
        summary = train(config, workdir, quiet=True)
    return workdir, summary, keys.unread()


def test_the_run_leaves_all_its_records(finished):
    workdir, summary, _ = finished
    assert {p.name for p in workdir.iterdir()} >= {
        "config.json", "versions.json", "metrics.jsonl", "rollouts.jsonl", "summary.json", "report.html", "checkpoints",
    }  # fmt: skip
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert summary["status"] == "finished" and summary["steps"] == 4
    for capability in presets.CAPABILITIES:
        assert set(summary["accuracy"][capability]) == {"base", "after_perception", "after_merged", "final"}
    assert {"seconds", "step_seconds_median", "format_reward_final", "blind"} <= set(summary)
    assert set(summary["blind"]) == {"perception", "text", "visual"} and max(summary["blind"].values()) < 0.4
    versions = json.loads((workdir / "versions.json").read_text())
    assert versions["jax"] and "commit" in versions


def test_no_compilation_after_warm_up(finished):
    workdir, summary, _ = finished
    steps = [r for r in read_jsonl(workdir / "metrics.jsonl") if r["type"] == "step"]
    assert len(steps) == 4
    assert [step["compilations"] for step in steps] == [0, 0, 0, 0]
    assert summary["compilations_after_warmup"] == 0


def test_sampler_and_trainer_agree(finished):
    _, summary, _ = finished
    assert summary["logprob_difference_mean"] < 1e-4


def test_step_records_have_every_figure(finished):
    workdir, _, _ = finished
    step = [r for r in read_jsonl(workdir / "metrics.jsonl") if r["type"] == "step"][-1]
    keys = """reward reward_std advantage_max accuracy format response_length trained_tokens kl entropy loss grad_norm
        clip_fraction_low clip_fraction_high clip_fraction_dual equal_groups right_groups drawn_groups dropped_groups
        refused_prompts truncated token_padding patch_padding packing tokens micro_batches tokens_per_second seconds
        seconds_data seconds_rollout seconds_reward seconds_pack seconds_update seconds_sync skipped_updates
        policy_loss logprob_difference_mean logprob_difference_max learning_rate"""
    for key in keys.split():
        assert np.isfinite(step[key]), key
    assert step["stage"] == "merged" and step["stage_step"] == 2 and step["micro_batches"] in (1, 2)
    assert step["drawn_groups"] == 4 and step["dropped_groups"] == 0
    lengths = [step.get(f"response_length/{name}", 0) for name in presets.CAPABILITIES]  # of those in this step
    assert step["trained_tokens"] == 12 * step["response_length"] and max(lengths) >= step["response_length"]


def test_rollouts_are_logged_with_rewards_and_images(finished):
    workdir, _, _ = finished
    rollouts = read_jsonl(workdir / "rollouts.jsonl")
    assert len(rollouts) == 8 and all(len(r["samples"]) == 3 for r in rollouts)
    assert all((workdir / image).is_file() for r in rollouts for image in r["images"])
    for rollout in rollouts:
        assert abs(sum(s["advantage"] for s in rollout["samples"])) < 1e-4


def test_every_config_key_is_read(finished, own):
    # Stages that `order` leaves out are not read, nor is what stands in for a checkpoint where there is one.
    # The servers' section is read as one where there are servers (rollout.sglang.settings.Settings has its keys).
    # Sets that have files are not built; validated is `own`'s one (tests/data/test_sets.py reads all keys of a set).
    files = tuple(f"config.data.sets.{name}.{key}" for name in presets.CAPABILITIES for key in ("source", "validation"))
    allowed = ("config.stages.text", "config.stages.visual", "config.create", "config.rollout.sglang")
    unread = set(finished[2]) & set(own[2])  # LoRA's keys are read where it has a rank
    assert [key for key in sorted(unread) if not key.startswith((*allowed, *files))] == []


def test_presets_share_their_keys():
    def keys(node, path=""):
        if not isinstance(node, ConfigDict):
            return {path}
        return {path} | {k for key, value in node.items() for k in keys(value, f"{path}.{key}")}

    assert keys(presets.get("laptop")) == keys(presets.get("qwen3_vl_8b"))


def test_checkpoints_load_in_transformers_and_differ_from_the_base(finished, checkpoint):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    workdir, summary, _ = finished
    final = Path(summary["checkpoint"])
    assert final == workdir / "checkpoints" / "final"
    loaded, info = AutoModelForImageTextToText.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert str(loaded.dtype) == "torch.bfloat16"
    assert AutoTokenizer.from_pretrained(final).chat_template
    trained, base = huggingface.load(final), huggingface.load(checkpoint)
    moved = abs(np.asarray(trained.text.embed.embedding[...]) - np.asarray(base.text.embed.embedding[...])).max()
    assert moved > 1e-5
    assert (workdir / "checkpoints" / "1-perception" / "model.safetensors").is_file()


def test_the_same_seed_gives_the_same_run(finished, checkpoint, sets, tmp_path):
    workdir, summary, _ = finished
    again = train(tiny.config(checkpoint, sets), tmp_path, quiet=True)
    assert again["accuracy"] == summary["accuracy"]
    losses = [[r["loss"] for r in read_jsonl(d / "metrics.jsonl") if r["type"] == "step"] for d in (workdir, tmp_path)]
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------- the user's own data, bad input


@pytest.fixture(scope="module")
def own(checkpoint, tmp_path_factory):
    """A user's rows and reward: imitated first, then GRPO of low-rank factors in two updates of two micro-batches, with
    groups drawn again. Work directory, summary, and the config keys that nothing read."""
    directory = tmp_path_factory.mktemp("own")
    good = directory / "good.png"
    random_image(32, 32).save(good)
    (directory / "broken.png").write_bytes(b"not a picture")
    problems = [Problem(str(i), f"What is {i}?", "red", (str(good),), response="a red") for i in range(6)]
    problems += [
        Problem("broken", "What?", "red", (str(directory / "broken.png"),), response="a"),
        Problem("missing", "What?", "red", (str(directory / "nowhere.png"),), response="a"),
        Problem("long", "word " * 300, "red", response="a"),
    ]
    path = directory / "mine.jsonl"
    write_rows(path, problems)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"problem": "no answer", "answer": ""}\n')
    changes = {f"data.sets.perception.{split}": str(path) for split in ("train", "test", "validation")}
    changes |= {
        "reward.function": "tests.own_rewards:by_length", "evaluation.sets": ("perception",),
        "model.lora.rank": 2, "objective.updates_per_batch": 2, "packing.shapes": ((160, 4, 64),),
        "rollout.dynamic_retries": 1, "validation.every": 2,
        "evaluation.instruction": "system", "evaluation.base_instruction": "none",
    }  # fmt: skip
    config = tiny.config(checkpoint, {}, order=("merged", "perception"), **changes)
    config.stages.merged.update({"objective": "sft", "data": ("perception",), "freeze": ""})
    keys = ReadKeys(config)
    with pytest.MonkeyPatch.context() as monkeypatch, keys.recording(monkeypatch):
        summary = train(config, directory / "run", quiet=True)
    return directory / "run", summary, keys.unread()


def test_own_data_own_reward_and_bad_rows(own):
    workdir, summary, _ = own
    assert summary["status"] == "finished"
    assert summary["skipped"]["images"] == 2 and summary["skipped"]["prompts"] == 1
    assert summary["instruction"] == {"training": "suffix", "evaluation": "system", "base": "none"}
    assert "The base was asked with no instruction" in (workdir / "report.html").read_text()
    assert summary["skipped"]["rows"] == 3  # the same file read as train, test and validation
    rollouts = read_jsonl(workdir / "rollouts.jsonl")
    rewards = {(s["response"], s["reward"]) for r in rollouts for s in r["samples"]}
    assert rewards and all(reward == float(len(response) % 2) for response, reward in rewards)


def test_three_of_nine_questions_are_left_out_of_every_accuracy_and_count_as_wrong(own):
    workdir, summary, _ = own
    records = read_jsonl(workdir / "metrics.jsonl")
    evaluated = [r for r in records if r["type"] == "evaluation"]
    validated = [r for r in records if r["type"] == "validation"]
    for record in (*evaluated, *(r["perception"] for r in validated)):
        assert (record["questions"], record["left_out"]) == (6, 3)
        assert record["accuracy"] == pytest.approx(record["accuracy_answered"] * 6 / 9)
    assert summary["best_validation"] == max(r["perception"]["accuracy"] for r in validated)
    assert set(summary["left_out"]["perception"].values()) == {3}
    page = (workdir / "report.html").read_text()
    assert page.count("without 3 left out") == len(summary["accuracy"]["perception"])
    asked = json.loads((workdir / "questions.json").read_text())["evaluation"]["sets"]["perception"]
    assert (asked["questions"], asked["of"], len(asked["ids"])) == (9, 9, 9)


def test_micro_batches_updates_and_retries_of_a_run(own):
    workdir, summary, _ = own
    steps = [r for r in read_jsonl(workdir / "metrics.jsonl") if r["type"] == "step"]
    assert [step["objective"] for step in steps] == ["sft", "sft", "grpo", "grpo"]
    assert all(step["compilations"] == 0 for step in steps)
    assert all(np.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps[:2])
    for step in steps[2:]:
        assert step["micro_batches"] == 4 and step["drawn_groups"] in (4, 8)
        assert step["drawn_groups"] == 4 or step["dropped_groups"] + 4 * step["equal_groups"] > 0
    validated = [r["accuracy"] for r in read_jsonl(workdir / "metrics.jsonl") if r["type"] == "validation"]
    assert len(validated) == 2 and summary["best_validation"] == max(validated)
    assert (workdir / "checkpoints" / "best" / "model.safetensors").is_file()


def run_main(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "capcur_jax.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/staged.py:nope"], ["unknown preset 'nope'", "qwen3_vl_8b"]),
        (["--config=configs/absent.py"], ["configs/absent.py"]),
        (["--config=configs/staged.py", "--config.nope=1"], ["nope"]),
        (
            ["--config=configs/staged.py", "--config.rollout.sglang.router=python"],
            ["config.rollout.sglang.router was removed", "config.rollout.sglang.addresses"],
        ),
        (
            ["--config=configs/staged.py:qwen3_vl_8b"],
            ["config.checkpoint", "config.data.sets.perception.train", "config.data.sets.visual.test", ".parquet"],
        ),
        (
            ["--config=configs/staged.py:qwen3_vl_8b_turns", "--config.rollout.sglang.python=/nowhere/python"],
            ["config.checkpoint", "config.rollout.sglang.python = '/nowhere/python' is no executable"],
        ),
        (["--config=configs/staged.py", "--config.checkpoint=/nowhere"], ["/nowhere", "config.json"]),
        (["--config=configs/staged.py", "--config.order=('speech',)"], ["speech", "perception"]),
        ([], ["error: no config: give one of configs/", "--config=configs/staged.py"]),
        (["configs/staged.py"], ["error: no config: give one of configs/"]),
        (["--config.seed=1"], ["error: no config: give one of configs/", "--config.seed=1"]),
        (["--seed=1"], ["error: unknown argument --seed; settings look like --config.seed=1"]),
        (["--confg=configs/staged.py"], ["error: unknown argument --confg (did you mean --config?)"]),
        (["--config=configs/staged.py", "--seed=1"], ["error: unknown argument --seed; settings"]),
        (["--config=configs/staged.py", "--process_id=one"], ["error: flag --process_id=one"]),
    ],
)
def test_mistakes_get_one_clear_line(arguments, words, tmp_path):
    done = run_main(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode not in (0, None)
    for word in words:
        assert word in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


DELETED_KEY = """
from capcur_jax import presets


def get_config():
    config = presets.get("laptop")
    {set}
    return config
"""


@pytest.mark.parametrize(
    "set_it",
    [
        "config.rollout.sglang.router = 'python'",
        "config.rollout.sglang.update({'router': ''})",
        "with config.unlocked(): config.rollout.sglang.router = ''",
    ],
)
def test_a_config_file_with_a_deleted_key_is_told_what_to_use(set_it, tmp_path):
    (tmp_path / "old.py").write_text(DELETED_KEY.format(set=set_it))
    done = run_main(f"--config={tmp_path / 'old.py'}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: config.rollout.sglang.router was removed: ")
    assert "config.rollout.sglang.addresses" in done.stderr
    assert not list((tmp_path / "run").glob("*/*"))


def test_servers_that_are_gone_are_one_clear_message_too(monkeypatch, tmp_path):
    from capcur_jax import main  # here: runs import this module for its reward, and would define their flags twice

    def gone(*_, **__):
        raise RolloutError("no SGLang server is left\nlast words")

    for name, value in (("CONFIG", presets.get("laptop")), ("WORKDIR", str(tmp_path)), ("PROFILE", ""), ("PUSH", "")):
        monkeypatch.setattr(main, f"_{name}", types.SimpleNamespace(value=value))
    for name in ("COORDINATOR", "PROCESS_ID", "PROCESS_COUNT", "ACCEPT"):
        monkeypatch.setattr(main, f"_{name}", types.SimpleNamespace(value="" if name == "COORDINATOR" else None))
    monkeypatch.setattr(main.config_flags, "get_config_filename", lambda _: "staged.py")
    monkeypatch.setattr("capcur_jax.train.train", gone)
    with pytest.raises(SystemExit) as ended:
        main.main(["main"])
    assert str(ended.value) == (
        f"error: no SGLang server is left\nlast words\nthe same command with --workdir={tmp_path} goes on"
    )


def test_a_finished_run_says_so_and_is_left_alone(finished, checkpoint, sets):
    workdir, summary, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    settings = {**tiny.SETTINGS, **sets, "checkpoint": checkpoint, "order": ("perception", "merged")}
    for stage in presets.laptop().stages:
        settings |= {f"stages.{stage}.steps": 2, f"stages.{stage}.prompts": 4}
    done = run_main("--config=configs/staged.py", f"--workdir={workdir}", *tiny.arguments(settings))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "holds a finished run: 4 steps" in done.stdout and summary["checkpoint"] in done.stdout
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.fixture
def unfinished(finished, tmp_path):
    """As if the run had been stopped in its last evaluation."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "final")
    return tmp_path / "run"


def test_another_config_is_refused_with_the_difference(checkpoint, sets, unfinished):
    before = (unfinished / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="started with another config") as caught:
        train(tiny.config(checkpoint, sets, seed=7, **{"log.rollouts_every": 2}), unfinished, quiet=True)
    lines = [line for line in str(caught.value).splitlines() if "->" in line and "stored" not in line]
    assert len(lines) == 1 and "seed" in lines[0] and "0" in lines[0] and "7" in lines[0]  # `log` may change
    assert (unfinished / "metrics.jsonl").read_bytes() == before


def test_running_again_does_what_is_left(finished, checkpoint, sets, unfinished, capsys):
    _, summary, _ = finished
    again = train(tiny.config(checkpoint, sets), unfinished)
    assert "vs base" in capsys.readouterr().out  # which another process measured
    assert again["status"] == "finished" and again["steps"] == summary["steps"]
    assert again["accuracy"] == summary["accuracy"] and again["seconds"] > 0
    assert Path(again["checkpoint"]) == unfinished / "checkpoints" / "final"
    for kind, keys in {"step": ("step", "loss", "reward"), "evaluation": ("after", "capability", "accuracy")}.items():
        now, then = (
            [[r[key] for key in keys] for r in read_jsonl(d / "metrics.jsonl") if r["type"] == kind]
            for d in (unfinished, finished[0])
        )
        assert now == then


def test_a_work_directory_of_a_run_that_lives_is_refused_and_left_alone(checkpoint, sets, tmp_path):
    with Lock(tmp_path):
        before = [path.name for path in tmp_path.iterdir()]
        with pytest.raises(InputError, match=rf"is another run's: process {os.getpid()} on"):
            train(tiny.config(checkpoint, sets), tmp_path, quiet=True)
        assert [path.name for path in tmp_path.iterdir()] == before


def test_an_image_that_a_later_stage_would_refuse_is_refused_before_the_first(checkpoint, sets, tmp_path):
    short = {"packing.shapes": ((320, 4, 60),)}
    with pytest.raises(InputError, match=r"the patches of config\.packing\.shapes = .*: an image may have 64 patches"):
        train(tiny.config(checkpoint, sets, ("text", "perception"), **short), tmp_path, quiet=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_whose_every_update_is_left_out_ends_with_the_tensors_and_exports_nothing(
    checkpoint, sets, tmp_path, monkeypatch
):
    monkeypatch.setattr(objectives, "group_advantages", lambda rewards, **_: rewards * np.nan)
    with pytest.raises(InputError, match=r"every update of the last 2 steps was left out(?s:.*)gradients that are NaN"):
        train(tiny.config(checkpoint, sets), tmp_path, quiet=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["checkpoint"] is None and summary["skipped"]["updates"] == 2
    assert not (tmp_path / "checkpoints").exists() and "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert not (tmp_path / "run.lock").exists()


def test_ctrl_c_leaves_a_loadable_checkpoint_and_a_summary(checkpoint, sets, tmp_path):
    command = [
        sys.executable, "-m", "capcur_jax.main", "--config=configs/staged.py", f"--workdir={tmp_path / 'run'}",
        f"--config.checkpoint={checkpoint}", "--config.stages.perception.steps=2000",
        "--config.stages.perception.prompts=4", *tiny.arguments({**tiny.SETTINGS, **sets}),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        limit = time.monotonic() + 600
        while time.monotonic() < limit and process.poll() is None:
            if metrics.exists() and '"step"' in metrics.read_text() and '"stage_step"' in metrics.read_text():
                break
            time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        output = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert process.returncode == 130, output[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["steps"] >= 1
    assert summary["accuracy"]["perception"]["base"] is not None
    huggingface.load(summary["checkpoint"])
    assert (tmp_path / "run" / "report.html").is_file()
