"""Names on the Hub become files of the cache; what can't be had is said with its remedy. The Hub is a stand-in."""

from __future__ import annotations

import socket
import time

import pytest
from huggingface_hub import constants

from capcur_jax.data import identity
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import write_rows
from capcur_jax.data.sets import Sets
from capcur_jax.errors import InputError
from capcur_jax.hub import download
from capcur_jax.presets import get

NAME = "owner/small-vl"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "merges.txt": b"a b",
    "README.md": b"card",
    "training_args.bin": b"no",
    "onnx/model.safetensors": b"no",
}
NEEDED = {"config.json", "model.safetensors", "merges.txt", "README.md"}


def refused(spec: str, **options) -> str:
    with pytest.raises(InputError) as raised:
        download.checkpoint(spec, **options)
    assert "\n" not in str(raised.value) and spec in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("path", ["model", "runs/a/final", "/tmp/model", "./own/model", "~/model", "own/model/", ""])
def test_a_path_is_a_path(path):
    assert download.named(path) is None


def test_a_checkpoint_is_what_is_needed_of_it(hub):
    commit = hub.add(f"models/{NAME}", FILES)
    directory = download.checkpoint(NAME)
    assert {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()} == NEEDED
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert download.version(NAME, directory) == f"{NAME}@{commit}"
    download.checkpoint(NAME)
    assert hub.fetched("safetensors") == 1


def test_weights_come_when_they_are_needed(hub):
    hub.add(f"models/{NAME}", FILES)
    assert not (download.checkpoint(NAME, weights=False) / "model.safetensors").exists()
    assert hub.fetched("safetensors") == 0
    assert (download.checkpoint(NAME) / "model.safetensors").exists()


def test_a_folder_of_that_name_wins(hub, tmp_path):
    hub.add(f"models/{NAME}", FILES)
    (tmp_path / NAME).mkdir(parents=True)
    assert (tmp_path / download.checkpoint(NAME)).samefile(tmp_path / NAME)
    assert download.version(NAME, tmp_path / NAME) == "" and not hub.asked


def test_a_revision_stays_what_it_was(hub):
    old = hub.add(f"models/{NAME}", FILES)
    new = hub.add(f"models/{NAME}", FILES | {"config.json": b"[]"})
    for spec, commits, expected in (
        (NAME, {}, new),
        (f"{NAME}@{old}", {}, old),
        (NAME, {NAME: old}, old),  # a run that began with it
        (f"{NAME}@main", {NAME: old}, new),
    ):
        directory = download.checkpoint(spec, commits=commits)
        assert download.version(spec, directory) == f"{NAME}@{expected}"
        assert download.begun_with({"checkpoint": f"{NAME}@{expected}", "versions: jax": "0.10"}) == {NAME: expected}


def test_without_a_network_the_cache_is_used(hub, monkeypatch):
    hub.add(f"models/{NAME}", FILES)
    before = download.checkpoint(NAME, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert download.checkpoint(NAME, weights=False) == before and not hub.asked
    said = refused(NAME)  # the weights were not needed then
    assert "HF_HUB_OFFLINE is set" in said and f"`hf download {NAME}`" in said and "local directory" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)  # between huggingface_hub's tries
    at(monkeypatch, "http://127.0.0.1:9")  # nothing listens there
    assert download.checkpoint(NAME, weights=False) == before
    assert "the Hub can't be reached" in refused("owner/another")
    assert "the Hub can't be reached" in refused(NAME)
    config = get("laptop")
    config.data.sets.text.train = "hf://datasets/owner/sums/train.parquet"
    with pytest.raises(InputError, match="the Hub can't be reached"):
        Sets(config.data, before).path("text", "train")
    assert not waited  # each is asked for once


def at(monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_hub_that_never_answers_is_asked_once(hub, monkeypatch):
    """As where packets get lost."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "the Hub can't be reached" in refused(NAME)
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert not waited


def test_what_cannot_be_had_is_said_with_its_remedy(hub):
    assert "`hf auth login`" in refused("owner/nothing")
    hub.add(f"models/{NAME}", FILES)
    assert "no revision 'v2'" in refused(f"{NAME}@v2")
    hub.add("models/owner/pictures", {"README.md": b""})
    assert "no config.json" in refused("owner/pictures", key="--checkpoint")
    hub.add("models/owner/gated", FILES)
    hub.gated.add("models/owner/gated")
    said = refused("owner/gated", key="--checkpoint")
    assert said.startswith("--checkpoint = owner/gated") and f"ask at {hub.endpoint}/owner/gated" in said


def test_a_file_of_a_data_set(hub, tmp_path):
    write_rows(tmp_path / "rows.parquet", [Problem("1", "What is 2 + 3?", "5"), Problem("2", "What is 2 + 4?", "6")])
    rows = (tmp_path / "rows.parquet").read_bytes()
    commit = hub.add("datasets/owner/sums", {"data/train.parquet": rows})
    config = get("laptop")
    config.data.sets.text.train = "hf://datasets/owner/sums/data/train.parquet"
    sets = Sets(config.data, tmp_path)
    sets.fetch({("text", "train"), ("visual", "train"), ("unknown", "train"), ("text", "source")})
    assert [problem.answer for problem in sets.problems("text", "train")] == ["5", "6"]
    said = identity.of_run(config, sets, {("text", "train")})
    assert said["data.sets.text.train"] == f"hf://datasets/owner/sums@{commit}/data/train.parquet"
    hub.add("datasets/owner/sums", {"data/train.parquet": b"another"})
    again = Sets(config.data, tmp_path, download.begun_with(said))
    assert again.version("text", "train") == said["data.sets.text.train"]
    assert Sets(config.data, tmp_path).path("text", "train").read_bytes() == b"another"
    for spec, expected in (
        ("hf://datasets/owner/sums", "name a file of the data set"),
        ("hf://datasets/owner/sums/none.parquet", "the repository has no none.parquet"),
    ):
        config.data.sets.text.train = spec
        with pytest.raises(InputError, match=expected):
            Sets(config.data, tmp_path).path("text", "train")
