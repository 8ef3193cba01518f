"""An export goes to the Hub whole, or the message says what to do. The Hub is a stand-in."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from capcur_jax.errors import InputError
from capcur_jax.hub import push
from tests.hub.stand_in import TOKEN

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"# A card\n"}


@pytest.fixture
def export(tmp_path):
    directory = tmp_path / "run" / "checkpoints" / "final"
    directory.mkdir(parents=True)
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture(autouse=True)
def logged_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_a_new_repository_is_private_and_gets_all_files(hub, export, capsys):
    push.main([str(export), "owner/mine"])
    assert capsys.readouterr().out == f"{hub.endpoint}/owner/mine\n"
    assert hub.made["owner/mine"]["visibility"] == "private"
    assert hub.files("models/owner/mine") == FILES
    push.main([str(export), "owner/mine"])  # again, into what is there


def test_a_push_that_fails_says_how_to_repeat_it(hub, export, capsys):
    hub.broken = True
    with pytest.raises(SystemExit) as ended:
        push.main([str(export), "owner/mine"])
    assert f"python -m capcur_jax.hub.push {export} owner/mine" in str(ended.value)
    assert "is whole, but was not sent" in str(ended.value) and len(str(ended.value).splitlines()) == 1


def test_what_would_fail_later_is_said_at_once(hub, export, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'mine' names no repository"):
        push.check("mine")
    with pytest.raises(InputError, match="holds no checkpoint"):
        push.push(tmp_path, "owner/mine")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="`hf auth login`"):
        push.check("owner/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        push.push(export, "owner/mine")
    assert not hub.asked
