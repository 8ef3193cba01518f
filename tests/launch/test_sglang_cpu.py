"""The install script of SGLang's CPU server, without the two minutes that pip takes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    """Its module, whose pip and imports are written down instead of run."""
    spec = importlib.util.spec_from_file_location("sglang_cpu", ROOT / "launch" / "sglang_cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ran = []

    def create(directory, with_pip):
        directory.mkdir(parents=True)
        (directory / "pyvenv.cfg").touch()
        module.ran.append("venv")

    def run(command, **environment):
        module.ran.append("check" if module.CHECK in command else command)

    monkeypatch.setattr(module.venv, "create", create)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "adjust", lambda python: module.ran.append("adjust"))
    return module


def test_it_installs_once(script, tmp_path):
    python = script.install(tmp_path / "env")
    assert python == tmp_path / "env" / "bin" / "python"
    kinds = [entry if isinstance(entry, str) else "--no-deps" in entry for entry in script.ran]
    assert kinds == ["venv", False, True, "adjust", "check"]
    assert "sglang==0.5.23" in script.ran[2] and "sglang==0.5.23" not in script.ran[1]
    assert script.install(tmp_path / "env") == python and len(script.ran) == 5


def test_other_pins_and_an_interrupted_install_start_again(script, tmp_path, monkeypatch):
    script.install(tmp_path / "env")
    changed = tmp_path / "pins.txt"
    changed.write_text(script.PINS.read_text().replace("sglang==0.5.23", "sglang==0.5.24"))
    monkeypatch.setattr(script, "PINS", changed)
    monkeypatch.setattr(script, "adjust", lambda python: sys.exit("interrupted"))
    (tmp_path / "env" / "old").touch()
    with pytest.raises(SystemExit, match="interrupted"):
        script.install(tmp_path / "env")
    monkeypatch.setattr(script, "adjust", lambda python: None)
    script.ran.clear()
    script.install(tmp_path / "env")
    assert script.ran[0] == "venv" and not (tmp_path / "env" / "old").exists()


def test_what_is_no_environment_is_left_alone(script, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="something else"):
        script.install(tmp_path)
    assert (tmp_path / "mine.txt").exists() and not script.ran


def test_a_second_one_waits(script, tmp_path):
    code = "import sys, fcntl, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    lock = tmp_path / "env.lock"
    other = subprocess.Popen(
        [sys.executable, "-c", code, lock], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    said = []

    def say(text):
        said.append(text)
        if "another process" in text:
            assert not script.ran
            other.communicate("\n")  # it lets go

    script.say = say
    script.install(tmp_path / "env")
    assert "another process" in said[0] and script.ran[0] == "venv"


def test_the_stand_in_imports_and_raises_when_called(tmp_path):
    pytest.importorskip("torch")
    package = tmp_path / "sgl_kernel"
    package.mkdir()
    spec = importlib.util.spec_from_file_location("sglang_cpu", ROOT / "launch" / "sglang_cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (package / "__init__.py").write_text(module.KERNELS)
    (package / "mamba.py").write_text(module.STATE_SPACE_KERNELS)
    code = """
from sgl_kernel import rmsnorm
from sgl_kernel.mamba import causal_conv1d_fwd
for kernel in (rmsnorm, causal_conv1d_fwd):
    try:
        kernel(1)
    except NotImplementedError as error:
        print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rmsnorm is a CUDA kernel") and "causal_conv1d_fwd is a CUDA kernel" in done.stdout


def test_gpu_and_cpu_hosts_have_the_same_server():
    pin = next(line for line in (ROOT / "launch" / "sglang_cpu.txt").read_text().splitlines() if "sglang==" in line)
    assert f'"sglang": ["{pin}"]' in (ROOT / "setup.py").read_text()
