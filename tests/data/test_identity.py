"""A run that goes on reads what it read when it began."""

import json
import os
import shutil

import pytest

from capcur_jax import presets
from capcur_jax.data import identity
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import write_rows
from capcur_jax.data.sets import Sets
from capcur_jax.errors import InputError
from tests.conftest import random_image

SPLITS = {("perception", "train"), ("text", "test")}


@pytest.fixture
def run(tmp_path, checkpoint, monkeypatch):
    """read(): what a run of own rows, an own reward and an own checkpoint reads; its directory."""
    random_image(8, 8).save(tmp_path / "a.png")
    write_rows(tmp_path / "train.jsonl", [Problem("1", "What?", "red", (str(tmp_path / "a.png"),))])
    write_rows(tmp_path / "test.jsonl", [Problem("1", "2 + 2?", "4")])
    shutil.copytree(checkpoint, tmp_path / "base")
    (tmp_path / "own_score.py").write_text("def score(problem, response): return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = presets.get("laptop")
    config.update_from_flattened_dict(
        {
            "data.sets.perception.train": str(tmp_path / "train.jsonl"), "checkpoint": str(tmp_path / "base"),
            "data.sets.text.test": str(tmp_path / "test.jsonl"), "reward.function": "own_score:score",
        }
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    return tmp_path, lambda: identity.of_run(config, Sets(config.data, tmp_path / "run" / "data"), SPLITS)


def other_row(directory):
    write_rows(directory / "train.jsonl", [Problem("1", "What?", "tan", (str(directory / "a.png"),))])


CHANGES = {
    "data.sets.perception.train": other_row,
    "data.sets.perception.train: images": lambda directory: random_image(9, 9).save(directory / "a.png"),
    "checkpoint: model.safetensors": lambda directory: (directory / "base" / "model.safetensors").write_bytes(b"other"),
    "checkpoint: new.json": lambda directory: (directory / "base" / "new.json").write_text("{}"),
    "reward.function": lambda directory: (directory / "own_score.py").write_text("score = float\n"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_changed_is_refused_by_its_key_or_accepted_and_recorded(run, key):
    directory, read = run
    workdir, warned = directory / "run", []
    identity.check(workdir, read(), None, False, warned.append)
    identity.check(workdir, read(), 3, False, warned.append)
    CHANGES[key](directory)
    before = (workdir / identity.NAME).read_bytes()
    with pytest.raises(InputError, match=r"read something else (?s:.*--accept_changed_inputs)") as caught:
        identity.check(workdir, read(), 3, False, warned.append)
    (line,) = str(caught.value).splitlines()[1:-1]
    assert line.startswith(f"  {key}: ") and " -> " in line
    assert (workdir / identity.NAME).read_bytes() == before and not warned
    identity.check(workdir, read(), 3, True, warned.append)
    assert key in warned[0]
    for _ in range(2):  # accepted once, it is what the run reads
        identity.check(workdir, read(), 4, False, warned.append)
        (accepted,) = json.loads((workdir / identity.NAME).read_text())["accepted"]
        assert accepted["after_step"] == 3 and list(accepted["changed"]) == [key]


def test_other_packages_are_refused(run, monkeypatch):
    directory, read = run
    identity.check(directory / "run", read(), None, False, print)
    versions = identity.metrics.versions()
    monkeypatch.setattr(identity.metrics, "versions", lambda: versions | {"jax": "0.0.1", "dirty": "anyhow"})
    with pytest.raises(InputError, match=r"versions: jax: '.*' -> '0\.0\.1'"):
        identity.check(directory / "run", read(), 1, False, print)


def test_a_run_that_begins_anew_compares_nothing_and_one_without_its_inputs_says_so(run):
    directory, read = run
    workdir, warned = directory / "run", []
    (workdir / identity.NAME).write_text("{")
    with pytest.raises(InputError, match=r"inputs\.json is broken"):
        identity.check(workdir, read(), 2, True, warned.append)
    identity.check(workdir, read(), None, False, warned.append)
    (workdir / identity.NAME).unlink()
    identity.check(workdir, read(), 2, False, warned.append)
    assert len(warned) == 1 and "not known" in warned[0] and (workdir / identity.NAME).exists()


def test_a_large_file_is_known_by_its_ends_and_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_LARGE", 100)
    monkeypatch.setattr(identity, "_END", 10)
    file, seen = tmp_path / "weights", set()
    contents = b"a" * 200, b"b" + b"a" * 199, b"a" * 199 + b"b", b"a" * 201, b"a" * 200
    for content, time in zip(contents, (1, 1, 1, 1, 2), strict=True):
        file.write_bytes(content)
        os.utime(file, (time, time))
        seen.add(identity.of_file(file))
    assert len(seen) == 5
