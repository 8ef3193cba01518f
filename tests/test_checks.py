"""Settings that can't work are refused before anything starts."""

import dataclasses
import shutil

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest

from capcur_jax import checks, presets, schedule
from capcur_jax.checkpoints.checkpointing import Checkpoints, Progress, record_sizes, start_anew
from capcur_jax.data import identity
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import write_rows
from capcur_jax.data.sets import Sets
from capcur_jax.errors import InputError
from capcur_jax.records import jsonl


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.async_steps": 1}, "needs config.rollout.engine = 'sglang'"),
        ({"rollout.engine": "sglang"}, "config.rollout.sglang.python"),
        ({"rollout.engine": "sglang", "rollout.sglang.python": "p"}, "the trainer would take GPUs"),
        (
            {
                "rollout.engine": "sglang", "rollout.sglang.python": "p", "mesh.gpus": (0, 1),
                "rollout.sglang.gpus": (1,),
            },
            "servers have .1, config",
        ),
        (
            {
                "rollout.engine": "sglang", "rollout.sglang.python": "p", "rollout.sglang.device": "cpu",
                "rollout.async_steps": 1,
            },
            "sampler_correction",
        ),
        (
            {
                "rollout.engine": "sglang", "rollout.sglang.python": "p", "rollout.async_steps": 1,
                "objective.sampler_correction": "truncate", "rollout.sglang.colocate": True,
            },
            "take turns; choose one",
        ),
        ({"rollout.top_p": 0.9, "objective.sampler_correction": "truncate"}, "top_p = 0.9.*full softmax.*top_p = 1"),
        ({"rollout.top_k": 50, "objective.sampler_correction": "mask"}, "top_k = 50.*full softmax"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(changes, message):
    config = presets.laptop()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        checks._check_together(config, [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint", "gs://models/Qwen3-VL-8B"),
        ("data.sets.text.train", "s3://bucket/rows.jsonl"),
        ("rollout.sglang.weights", "gs://bucket/weights"),
    ],
)
def test_a_bucket_is_refused_where_files_are_read_or_written(key, value, tmp_path):
    config, stages, sets = data(tmp_path, **{key: value})
    with pytest.raises(InputError, match=f"config.{key}={value}: a bucket's address.*mount the bucket"):
        checks.check(config, stages, sets)


def test_the_presets_of_a_host_with_eight_gpus_differ_in_who_has_which():
    for name in ("qwen3_vl_8b", "qwen2_5_vl_7b"):
        split, turns = presets.get(f"{name}_split"), presets.get(f"{name}_turns")
        for config in (split, turns):
            with config.unlocked():
                config.rollout.sglang.python = "python"
            checks._check_together(config, [])
        assert not set(split.mesh.gpus) & set(split.rollout.sglang.gpus) and len(split.mesh.gpus) == 4
        assert turns.mesh.gpus == () and turns.rollout.sglang.servers == 8 and turns.rollout.sglang.colocate


ANSWERED = [Problem(f"a{i}", "?", "5") for i in range(3)]
CAPTIONS = [Problem(f"c{i}", "Describe it.", "", response="A cat.") for i in range(4)]


def data(folder, train=ANSWERED, test=ANSWERED, validation=ANSWERED, **changes):
    """What `check_data` gets: a stage on one set with these rows."""
    config = presets.get("laptop", order=("text",))
    for split, rows in (("train", train), ("test", test), ("validation", validation)):
        write_rows(folder / f"{split}.jsonl", rows)
        config.data.sets.text[split] = str(folder / f"{split}.jsonl")
    config.evaluation.sets = ("text",)
    config.update_from_flattened_dict(changes)
    return config, schedule.stages(config), Sets(config.data, folder)


def test_a_stage_of_rollouts_refuses_rows_without_an_answer_and_names_the_first(tmp_path):
    with pytest.raises(InputError) as error:
        checks.check_data(*data(tmp_path, train=ANSWERED + CAPTIONS))
    said = str(error.value)
    assert f"config.data.sets.text.train: {tmp_path / 'train.jsonl'}" in said and "grpo stage 'text'" in said
    assert "4 of 7 have none (the first: 'c0', 'c1', 'c2')" in said and "objective = 'sft'" in said
    checks.check_data(*data(tmp_path))
    checks.check_data(*data(tmp_path, train=CAPTIONS, **{"stages.text.objective": "sft"}))


def test_a_folder_of_save_to_disk_is_training_data(tmp_path):
    """As `Dataset.save_to_disk` leaves it."""
    rows = pyarrow.Table.from_pylist([{"problem": "2 + 2?", "answer": "4"}] * 3)
    (tmp_path / "saved").mkdir()
    with pyarrow.ipc.new_stream(str(tmp_path / "saved" / "data.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    config, stages, sets = data(tmp_path, **{"data.sets.text.train": str(tmp_path / "saved")})
    checks.check(config, stages, sets)
    checks.check_data(config, stages, sets)
    assert len(sets.problems("text", "train")) == 3
    before = identity.of_run(config, sets, {("text", "train")})
    (tmp_path / "saved" / "data.arrow").write_bytes(b"other")
    assert identity.of_run(config, sets, {("text", "train")}) != before
    config.data.sets.text.train = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere does not exist"):
        checks.check(config, stages, Sets(config.data, tmp_path))


def test_what_a_curriculum_leaves_out_needs_no_answer(tmp_path):
    rated = [dataclasses.replace(row, pass_rate=0.5) for row in ANSWERED]
    rated += [dataclasses.replace(row, pass_rate=0.0) for row in CAPTIONS]
    checks.check_data(*data(tmp_path, train=rated, **{"stages.text.curriculum.drop_all_wrong": True}))
    with pytest.raises(InputError, match="4 of 7 have none"):
        checks.check_data(*data(tmp_path, train=rated))


def test_held_out_questions_need_an_answer_too(tmp_path):
    sft = {"stages.text.objective": "sft"}
    with pytest.raises(InputError, match=r"sets\.text\.test: .*an accuracy needs an answer .* 1 of 2 have none"):
        checks.check_data(*data(tmp_path, train=CAPTIONS, test=[ANSWERED[0], CAPTIONS[0]], **sft))
    checks.check_data(*data(tmp_path, validation=CAPTIONS))  # nothing is validated
    with pytest.raises(InputError, match=r"sets\.text\.validation"):
        checks.check_data(*data(tmp_path, validation=CAPTIONS, **{"validation.every": 1}))


# ---------------------------------------------------------------------- a work directory that holds a run


def left(workdir, step, status=""):
    """What a run of the laptop's config leaves after so many steps."""
    config = presets.laptop()
    jsonl.write_json_atomic(workdir / "config.json", config.to_dict())
    with Checkpoints(workdir / "state", keep=1) as checkpoints:
        checkpoints.save_run(Progress(step=step), {"a": np.int32([3])}, record_sizes(workdir), wait=True)
    if status:
        jsonl.write_json_atomic(workdir / "summary.json", {"status": status})
    return config


@pytest.mark.parametrize("step", [0, 3])
def test_a_corrected_config_is_refused_only_if_something_was_learned(tmp_path, step):
    config = left(tmp_path, step)
    with Checkpoints(tmp_path / "state", keep=1) as checkpoints:
        if step:
            assert checks.goes_on_from(tmp_path, config, checkpoints) == step
        config.stages.text.learning_rate = 1e-5
        if step:
            with pytest.raises(InputError, match=r"stages\.text\.learning_rate: \S+ -> 1e-05"):
                checks.goes_on_from(tmp_path, config, checkpoints)
            assert checkpoints.latest() == step
        else:
            assert checks.goes_on_from(tmp_path, config, checkpoints) is None
            assert checkpoints.latest() is None


def test_a_run_killed_between_its_first_step_and_the_next_checkpoint_starts_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"type": "evaluation"}\n')
    config = left(tmp_path, 0)
    with (tmp_path / "metrics.jsonl").open("a") as records:
        records.write('{"type": "step"}\n{"type": "st')
    with Checkpoints(tmp_path / "state", keep=1) as checkpoints:
        assert checks.goes_on_from(tmp_path, config, checkpoints) is None
    assert start_anew(tmp_path, owner=True) == Progress()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_finished_run_has_its_checkpoint_too(tmp_path, checkpoint):
    config, warned = left(tmp_path, 3, "finished"), []
    assert checks.finished(tmp_path, config, warned.append) is None  # there is no checkpoint
    final = shutil.copytree(checkpoint, tmp_path / "checkpoints" / "final")
    assert checks.finished(tmp_path, config, warned.append) == {"status": "finished"}
    weights = (final / "model.safetensors").read_bytes()
    (final / "model.safetensors").write_bytes(weights[:-1])
    assert checks.finished(tmp_path, config, warned.append) is None
    assert len(warned) == 2 and "config.json" in warned[0] and "is of a finished run, but" in warned[1]
    (final / "model.safetensors").write_bytes(weights)
    config.seed = 5
    with pytest.raises(InputError, match="seed: 0 -> 5"):
        checks.finished(tmp_path, config, warned.append)
    config.seed = 0
    jsonl.write_json_atomic(tmp_path / "summary.json", {"status": "failed"})
    assert checks.finished(tmp_path, config, warned.append) is None
