"""The commands of a grid: which sets are rated, once for all runs, and with what."""

from __future__ import annotations

import json

import pytest

from capcur_jax import presets
from capcur_jax.data.row_files import stem
from capcur_jax.data.sets import SOURCES
from capcur_jax.errors import InputError
from capcur_jax.grid import jobs
from capcur_jax.grid.jobs import Plan, rated_file
from capcur_jax.presets import LAPTOP_STEPS

ROWS = ("staged", "difficulty", "capability_x_difficulty")


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """plan(*overrides); its sets are built at once."""

    def build(directory, name):
        return {"train": directory / f"{name}-train.jsonl"}

    for name in SOURCES:
        monkeypatch.setitem(SOURCES, name, build)
    return lambda *overrides: Plan.of(ROWS, (0, 1), "laptop", tmp_path, overrides)


def test_each_set_is_rated_once_and_runs_that_need_it_wait(plan, tmp_path):
    made = plan()
    prepared = made.preparations()
    assert [job.name for job in prepared] == [f"pass rates of {name}" for name in presets.CAPABILITIES]
    names = {job.name for job in prepared}
    assert [set(job.needs) == names for job in made.runs] == [False, False, True, True, True, True]
    assert not made.runs[0].needs
    for job, name in zip(prepared, presets.CAPABILITIES, strict=True):
        said = dict(argument.removeprefix("--").split("=", 1) for argument in job.arguments[3:])
        assert said["input"] == str(tmp_path / "data" / f"{name}-train.jsonl")
        assert said["output"] == str(rated_file(tmp_path, name)) and said["max_new_tokens"] == "48"
    for job in made.runs[2:]:
        assert job.config.data.sets.text.train == str(rated_file(tmp_path, "text"))
        assert job.config.data.sets.text.test == str(tmp_path / "data" / "text-test.jsonl")
    assert stem(rated_file(tmp_path, "text")) != "text-train"  # ids are the rows' own, whatever the file is called


def rate(tmp_path, name, model):
    file = rated_file(tmp_path, name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"id": "1", "pass_rate": 0.5, "pass_rate_by": {"model": model}}) + "\n")


def test_what_is_rated_is_not_rated_again(plan, tmp_path):
    rate(tmp_path, "text", presets.TINY_CHECKPOINT)
    assert [job.name for job in plan().preparations()] == ["pass rates of perception", "pass rates of visual"]
    rate(tmp_path, "visual", "/models/another")
    with pytest.raises(InputError, match=r"visual\.jsonl has pass rates of /models/another, and config\.checkpoint is"):
        plan().preparations()


def test_the_user_s_own_files_bring_their_pass_rates(plan):
    made = plan("--config.data.sets.text.train=mine.jsonl")
    assert list(made.rated) == ["perception", "visual"]
    assert made.runs[2].config.data.sets.text.train == "mine.jsonl"


def test_a_run_is_what_the_row_s_config_says(plan, tmp_path):
    job = plan("--config.log.tensorboard=False").runs[1]
    assert (job.row, job.seed, job.steps, job.config.seed) == ("staged", 1, 3 * LAPTOP_STEPS, 1)
    assert job.folder == tmp_path / "staged" / "seed1" and not job.config.log.tensorboard
    assert job.log.parent == job.folder
    assert jobs.command(job)[1:3] == ["-m", "capcur_jax.main"]
