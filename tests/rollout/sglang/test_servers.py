"""Servers that launch/sglang_servers.sh starts for a trainer elsewhere: flags, addresses, and a run with them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from capcur_jax.rollout.sglang import __main__ as servers
from tests.rollout.sglang.conftest import ROOT
from tests.rollout.sglang.test_run import FLAGS, run

WHERE = "config.rollout.sglang"


def script(workdir, *arguments: str) -> subprocess.Popen:
    command = ["bash", ROOT / "launch" / "sglang_servers.sh", "--config=configs/staged.py", f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, *arguments], env={**os.environ, "PYTHON": sys.executable, "HOST": "127.0.0.1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), f"error: {WHERE}.python = ''"),
        ((f"--{WHERE}.addresses=('http://a:1',)",), f"error: {WHERE}.python = ''"),
        ((f"--{WHERE}.python=p", f"--{WHERE}.colocate=True"), f"error: {WHERE}.colocate: servers of another host"),
        ((f"--{WHERE}.python=/nowhere/python",), "error: /nowhere/python is no executable"),
        ((f"--{WHERE}.pyton=p",), "error: --config configs/staged.py"),
    ],
)
def test_mistakes_get_one_clear_line(given, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert servers.main(["--config=configs/staged.py", f"--workdir={tmp_path}", "--host=127.0.0.1", *given]) == 1
    assert capsys.readouterr().err.startswith(words)


def test_they_take_the_trainers_whole_command_line():
    """launch/slurm.sbatch and the JobSets give both the same."""
    names = re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", (ROOT / "capcur_jax" / "main.py").read_text(encoding="utf-8"))
    given = [f"--{name}=1" for name in names] + ["--accept_changed_inputs", "--config.seed=1"]
    options, rest = servers.parser().parse_known_args(given)
    assert {"profile", "push_to_hub"} < set(names) and options.config == "1" and rest == ["--config.seed=1"]


def test_a_run_with_servers_that_were_started_by_hand(tmp_path, sglang_python, files):
    workdir, register = tmp_path / "run", tmp_path / "register"
    settings = {
        **{key: value for key, value in FLAGS.items() if key.startswith(WHERE)}, f"{WHERE}.python": sglang_python,
        "config.checkpoint": files["config.checkpoint"], f"{WHERE}.servers": "2", f"{WHERE}.memory_fraction": "0.3",
        f"{WHERE}.environment": "('TORCHDYNAMO_DISABLE=1',)",
    }  # fmt: skip
    started = script(workdir, f"--register={register}", *(f"--{key}={value}" for key, value in settings.items()))
    try:
        lines = []  # libraries have their own to say
        while not lines or not lines[-1].startswith("healthy: "):
            lines.append(started.stdout.readline())
            assert lines[-1], "".join(lines)
        said = lines[-1]
        addresses = f"({(register / '127.0.0.1.txt').read_text()})"
        assert said.count("http://127.0.0.1:") == 2 and f'{WHERE}.addresses="{addresses}"' in said
        steps = run(workdir, **files, **{f"{WHERE}.addresses": addresses, "config.order": "('text',)"})
        assert [step["step"] for step in steps] == [1, 2]
        assert all(step["logprob_difference_max"] < 1e-3 and step["rollout_restarts"] == 0 for step in steps)
        assert "launch_server" in (workdir / "sglang" / "127.0.0.1" / "server-1.log").read_text()
    finally:
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
