"""Stages that a rule ends: when it does, what becomes of the steps that are left; a killed run goes on to the same."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from safetensors.numpy import load_file

from capcur_jax import checks, presets, schedule
from capcur_jax.checkpoints.checkpointing import Progress
from capcur_jax.data.sets import Sets
from capcur_jax.errors import InputError
from capcur_jax.records.jsonl import read_jsonl
from capcur_jax.schedule import Switch
from capcur_jax.train import train
from tests import tiny
from tests.test_resume import records

BAD = -math.inf


@pytest.mark.parametrize(
    ("switch", "steps", "validations", "over"),
    [
        (Switch(), [1.0] * 99, [0.5] * 9, False),
        (Switch("mastered", window=3, above=0.5), [0.5, 0.5], [], False),  # too few to say
        (Switch("mastered", window=3, above=0.5), [0.0, 0.4, 0.6, 0.5], [], True),
        (Switch("mastered", window=3, above=0.5), [1.0, 0.4, 0.6, 0.4], [], False),
        (Switch("mastered", window=2, above=0.5), [0.9, BAD], [], False),
        (Switch("plateau", checks=2), [1.0] * 99, [], False),
        (Switch("plateau", checks=2), [], [0.5, 0.6, 0.6], False),
        (Switch("plateau", checks=2), [], [0.5, 0.6, 0.6, 0.3], True),
        (Switch("plateau", checks=2), [], [0.5, 0.4, 0.6, 0.5], False),
        (Switch("plateau", checks=1), [], [0.5, 0.5], True),
        (Switch("plateau", checks=1), [], [BAD, 0.1], False),
    ],
)
def test_when_a_stage_is_over(switch, steps, validations, over):
    assert switch.over(steps, validations) is over


def test_what_a_stage_leaves_goes_to_the_next():
    config = presets.get("laptop")
    config.update_from_flattened_dict({f"stages.{name}.steps": 200 for name in config.order})
    stages = schedule.stages(config)
    assert [schedule.with_what_is_left(stages, n, 200 * n).steps for n in range(3)] == [200, 200, 200]
    assert schedule.with_what_is_left(stages, 1, 120).steps == 280
    assert schedule.with_what_is_left(stages, 2, 120 + 30).steps == 450  # all that is left of 600
    assert Progress(stage=1, stage_step=30, step=150).before(1) == 120
    assert Progress(stage=1, stage_step=30, step=150).before(2) == 150


def config_with(rule, **changes):
    config = presets.get("laptop")
    config.update_from_flattened_dict({"stages.text.switch.rule": rule, **changes})
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (config_with("bored"), r"stages\.text\.switch\.rule = 'bored'; choose one of none, plateau, mastered"),
        (config_with("mastered", order=("perception", "text")), "no stage comes after it"),
        (
            config_with("mastered", **{"stages.text.prompts": 16, "stages.visual.prompts": 32}),
            "'visual', whose steps have 32 prompts instead of 16",
        ),
        (config_with("plateau"), r"needs validations: --config\.validation\.every=20"),
        (
            config_with("plateau", **{"validation.every": 5, "evaluation.sets": ("visual",)}),
            r"config\.evaluation\.sets has none of text to be validated",
        ),
        (config_with("mastered", **{"stages.text.objective": "sft"}), "objective 'sft' samples no response"),
        (config_with("mastered", **{"stages.text.switch.window": 0}), r"switch\.window = 0: it must lie in \[1, inf\)"),
        (
            config_with("mastered", **{"stages.text.switch.above": 1.5}),
            r"switch\.above = 1\.5: it must lie in \(0, 1\]",
        ),
    ],
)
def test_a_rule_that_can_t_work_ends_a_run_before_its_start(config, words, tmp_path):
    with pytest.raises(InputError, match=words):
        checks.check(config, schedule.stages(config), Sets(config.data, tmp_path))


# ---------------------------------------------------------------------- whole runs

RULES = {
    "mastered": {"switch.rule": "mastered", "switch.window": 2, "switch.above": 1e-9},
    "plateau": {"switch.rule": "plateau", "switch.checks": 1},
}


def settings_of(rule):
    return {
        "order": ("perception", "text"), "reward.function": "tests.own_rewards:by_length",
        "validation.every": 1 if rule == "plateau" else 0, "validation.questions": 4, "evaluation.questions": 4,
        "evaluation.blind": False, "log.tensorboard": False, "checkpointing.every": 1, "checkpointing.keep": 99,
        **{f"stages.{name}.steps": 4 for name in ("perception", "text")},
        **{f"stages.perception.{key}": value for key, value in RULES[rule].items()},
    }  # fmt: skip


@pytest.fixture(scope="module", params=RULES)
def adaptive(request, checkpoint, sets, tmp_path_factory):
    """The config's settings, and the work directory of an unbroken run."""
    settings = settings_of(request.param)
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    train(tiny.config(checkpoint, sets, **settings), workdir, quiet=True)
    return settings, workdir


@pytest.mark.e2e
def test_the_run_is_as_long_as_without_the_rule(adaptive):
    settings, workdir = adaptive
    found = read_jsonl(workdir / "metrics.jsonl")
    (switch,) = [record for record in found if record["type"] == "switch"]
    steps = [record["stage"] for record in found if record["type"] == "step"]
    used = switch["stage_step"]
    assert used < 4 and switch["rule"] == settings["stages.perception.switch.rule"] and switch["steps_left"] == 4 - used
    assert steps == ["perception"] * used + ["text"] * (8 - used)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["compilations_after_warmup"] == 0
    assert "after_perception" in summary["accuracy"]["text"] and (workdir / "checkpoints" / "1-perception").is_dir()


@pytest.mark.e2e
def test_a_run_that_was_killed_switches_where_the_unbroken_one_did(adaptive, checkpoint, sets, tmp_path):
    settings, unbroken = adaptive
    (switch,) = [r for r in read_jsonl(unbroken / "metrics.jsonl") if r["type"] == "switch"]
    theirs = load_file(unbroken / "checkpoints" / "final" / "model.safetensors")
    # Before it, at it, when the next stage has begun. From the switch on no rule is asked: one of them is enough there.
    for place in (-1, 0, 1) if switch["rule"] == "plateau" else (-1,):
        kept = switch["stage_step"] + place
        workdir = tmp_path / str(kept)
        shutil.copytree(unbroken, workdir)
        for state in (workdir / "state").iterdir():
            if state.name.isdecimal() and int(state.name) > kept:
                shutil.rmtree(state)
        shutil.rmtree(workdir / "checkpoints")
        (workdir / "summary.json").unlink()
        train(tiny.config(checkpoint, sets, **settings), workdir, quiet=True)
        assert records(workdir) == records(unbroken)
        ours = load_file(workdir / "checkpoints" / "final" / "model.safetensors")
        assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in theirs)
