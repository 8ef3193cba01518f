"""Servers as processes: what they serve, how they are started, and that nothing of them is left."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from capcur_jax.errors import InputError
from capcur_jax.models.inputs import Processor
from capcur_jax.rollout.sglang import engine as sglang
from capcur_jax.rollout.sglang import server
from capcur_jax.rollout.sglang.engine import SGLangEngine
from capcur_jax.rollout.sglang.server import Process
from capcur_jax.rollout.sglang.settings import Settings
from tests.conftest import random_image

HERE = Settings(python=sys.executable, device="cpu")


def wait_for(condition, seconds=20):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    # A zombie is still there until its parent, init here, has seen it.
    states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3] for pid in _members(group)]
    return all(state[0] == "Z" for state in states)


def _members(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.getpgid(int(entry.name)) == group:
                found.append(int(entry.name))
        except ProcessLookupError:
            continue
    return found


# ---------------------------------------------------------------------- settings


def test_settings_come_from_the_config_section():
    section = ml_collections.ConfigDict(
        {"python": "/x/python", "servers": 2, "gpus": (4, 5), "environment": ("A=b",), "arguments": ("--flag", "1")}
    )
    got = Settings.from_config(section)
    assert (got.servers, got.gpus, got.environment, got.arguments) == (2, (4, 5), ("A=b",), ("--flag", "1"))
    assert not got.deterministic and got.host == "127.0.0.1"
    assert Settings.from_config({"addresses": ["http://a:1"]}).addresses == ("http://a:1",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pyton": "x"}, r"sglang\.pyton does not exist; known: .*python"),
        ({}, r"sglang\.python = ''"),
        ({"python": "x", "device": "tpu"}, r"sglang\.device = 'tpu'.*cuda, cpu"),
        ({"python": "x", "dtype": "int8"}, r"sglang\.dtype"),
        ({"python": "x", "servers": 0}, r"sglang\.servers = 0"),
        ({"python": "x", "servers": 2, "tensor_parallel": 2, "gpus": (0, 1)}, r"sglang\.gpus.*4 different ids"),
        ({"python": "x", "gpus": (0, 0)}, r"sglang\.gpus"),
        ({"python": "x", "request_timeout_s": 0}, r"sglang\.request_timeout_s"),
        ({"python": "x", "memory_fraction": 1.5}, r"sglang\.memory_fraction"),
        ({"addresses": ("localhost:30000",)}, r"sglang\.addresses.*http://HOST:PORT"),
        ({"addresses": ("http://a:1", "http://a:1")}, r"names a server twice"),
        ({"python": "x", "colocate": True, "device": "cpu"}, r"sglang\.colocate"),
        ({"python": "x", "port": 65535, "servers": 3}, r"sglang\.port"),
    ],
)
def test_settings_that_can_not_be_are_refused_by_name(given, message):
    with pytest.raises(InputError, match=message):
        Settings.from_config(ml_collections.ConfigDict(given))


# ---------------------------------------------------------------------- what is served, and how


@pytest.mark.parametrize("kind", ["checkpoint", "windowed_checkpoint"])
def test_the_served_directory_is_the_checkpoint_without_weights_and_never_resizes(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    served = server.write_served(tmp_path / "served", source)
    names = {file.name for file in served.iterdir()}
    assert names == {file.name for file in source.iterdir() if file.suffix != ".safetensors"}
    assert (served / "config.json").read_bytes() == (source / "config.json").read_bytes()
    ours, theirs = Processor.from_directory(source), Processor.from_directory(served)
    side = ours.config.vision.patch_size * ours.config.vision.merge_size
    for width, height in ((1, 1), (3, 40), (50, 40)):  # below and above the checkpoint's own bounds
        image = random_image(width * side, height * side)
        prompt = theirs.prepare(theirs.render([None, "x"]), [image])
        vision = ours.config.vision
        assert prompt.grids == ((1, height * vision.merge_size, width * vision.merge_size),)
    text = ours.render([None, "x"])
    assert theirs.render([None, "x"]) == text


def test_newer_processor_files_are_unbounded_too(checkpoint, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    images = json.loads((checkpoint / "preprocessor_config.json").read_text())
    (source / "processor_config.json").write_text(json.dumps({"image_processor": images, "processor_class": "x"}))
    served = server.write_served(tmp_path / "served", source)
    found = json.loads((served / "processor_config.json").read_text())
    assert found["image_processor"]["size"]["shortest_edge"] == 1 and found["processor_class"] == "x"


def test_the_command_line_of_a_gpu_server():
    settings = Settings(
        python="/e/bin/python", servers=2, tensor_parallel=2, gpus=(1, 3, 5, 7), colocate=True, memory_fraction=0.6,
        arguments=("--context-length", "9000"), environment=("NCCL_DEBUG=INFO", "SGLANG_VLM_CACHE_SIZE_MB=100"),
    )  # fmt: skip
    line = server.command(settings, Path("/m"), 1, 31001, seed=10)
    assert line[:3] == ["/e/bin/python", "-m", "sglang.launch_server"] and line[-2:] == ["--context-length", "9000"]
    flags = dict(zip(line[3::2], line[4::2], strict=False))
    assert flags["--host"] == "127.0.0.1" and flags["--port"] == "31001" and flags["--load-format"] == "dummy"
    assert flags["--tensor-parallel-size"] == "2" and flags["--random-seed"] == "11" and flags["--dtype"] == "bfloat16"
    assert flags["--mem-fraction-static"] == "0.6" and flags["--device"] == "cuda"
    assert {"--skip-server-warmup", "--enable-memory-saver"} <= set(line) and "torch_native" not in line
    base = {"PATH": "/bin", "PYTHONPATH": "/ours", "VIRTUAL_ENV": "/ours"}
    assert server.environment(settings, 1, base) == {
        "PATH": "/bin", "SGLANG_VLM_CACHE_SIZE_MB": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "5,7", "NCCL_DEBUG": "INFO",
    }  # fmt: skip
    counted = server.environment(Settings(python="x", servers=3, tensor_parallel=2), 2, base)
    assert counted["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_ports_are_counted_up_or_free_and_one_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1 port {port}"):
            server.free_ports(Settings(python="x", port=port))
    assert len(set(server.free_ports(Settings(python="x", servers=3)))) == 3


# ---------------------------------------------------------------------- processes

# A process with a child that ignores SIGTERM, as a scheduler that hangs does.
STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""


def test_a_process_ends_with_all_that_it_started(tmp_path):
    process = Process("server 0", [sys.executable, "-c", STUBBORN], os.environ, tmp_path / "log")
    assert process.ended() == 0
    process.start()
    wait_for(lambda: "deaf" in process.tail().splitlines())
    group = process.group
    assert process.ended() is None and len(_members(group)) == 3
    process.stop(grace_s=0.2)
    assert gone(group) and process.ended() == 0
    process.stop()


@pytest.mark.parametrize("killed", [False, True])
def test_pixels_that_a_server_left_in_memory_are_deleted_with_it(tmp_path, monkeypatch, killed):
    monkeypatch.setattr(server, "MEMORY", tmp_path)
    process = Process("server 0", [sys.executable, "-c", STUBBORN], os.environ, tmp_path / "log")
    process.start()
    wait_for(lambda: "deaf" in process.tail().splitlines())
    group = process.group
    left = [tmp_path / f"sgl_shm_mm_{pid}_1b2c3d4e" for pid in _members(group) if pid != group]
    others = [tmp_path / f"sgl_shm_mm_{os.getpid()}_1b2c3d4e", tmp_path / "sgl_shm_odd", tmp_path / "else"]
    for file in (*left, *others):
        file.touch()
    if killed:
        process.note()
        os.killpg(group, signal.SIGKILL)
        wait_for(lambda: process.ended() is not None)
    process.stop(grace_s=0.2)
    assert len(left) == 2 and not any(file.exists() for file in left) and all(file.exists() for file in others)


def test_the_log_has_a_line_for_each_start_and_the_output(tmp_path):
    process = Process(
        "server 0", [sys.executable, "-c", "print('x' * 500); import sys; sys.exit(3)"], {}, tmp_path / "log"
    )
    for _ in range(2):
        process.start()
        wait_for(lambda: process.ended() is not None)
        assert process.ended() == 3
        process.stop()
    text = (tmp_path / "log").read_text()
    assert text.count("server 0 starts:") == 2 and text.count("x" * 500) == 2
    assert max(map(len, process.tail().splitlines())) == 240


def test_no_server_outlives_a_trainer_that_was_killed(tmp_path):
    trainer = f"""
import os, sys, time
from pathlib import Path
from capcur_jax.rollout.sglang.server import Process
process = Process("server 0", [sys.executable, "-c", {STUBBORN!r}], os.environ, Path({str(tmp_path / "log")!r}))
process.start()
print(process.group, flush=True)
time.sleep(600)
"""
    running = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True)
    group = int(running.stdout.readline())
    try:
        wait_for(lambda: (tmp_path / "log").exists() and "deaf" in (tmp_path / "log").read_text().splitlines())
        assert len(_members(group)) == 3
        running.send_signal(signal.SIGKILL)
        running.wait()
        wait_for(lambda: gone(group))
    finally:
        running.kill()
        if not gone(group):
            os.killpg(group, signal.SIGKILL)


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_a_server_that_dies_at_its_start_is_an_error_with_its_last_words(checkpoint, processor, tmp_path):
    python = script(tmp_path / "python", "echo there is no GPU in here >&2\nexit 3\n")
    with pytest.raises(InputError, match=r"(?s)ended with code 3.*server-0\.log.*there is no GPU in here"):
        SGLangEngine(processor, checkpoint, tmp_path, Settings(python=python))


def test_a_server_that_takes_too_long_is_an_error_and_ends(checkpoint, processor, tmp_path):
    python = script(tmp_path / "python", f"echo $$ > {tmp_path}/pid\nexec sleep 600\n")
    with pytest.raises(InputError, match=r"start_timeout_s = 1"):
        SGLangEngine(processor, checkpoint, tmp_path, Settings(python=python, start_timeout_s=1.0))
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_an_executable_that_does_not_exist_is_an_error_of_the_config(checkpoint, processor, tmp_path):
    with pytest.raises(InputError, match=r"/no/python is no executable; config\.rollout\.sglang\.python"):
        SGLangEngine(processor, checkpoint, tmp_path, Settings(python="/no/python"))


def test_windowed_checkpoints_that_sglang_can_not_serve_are_refused(windowed_checkpoint, tmp_path):
    processor = Processor.from_directory(windowed_checkpoint)
    with pytest.raises(InputError, match="patches of 14 x 14 pixels alone, this one's are 4"):
        SGLangEngine(processor, windowed_checkpoint, tmp_path, HERE)
    assert not np.any([file.name == "sglang" for file in tmp_path.iterdir()])


def test_weights_in_memory_of_a_killed_run_are_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(sglang, "MEMORY", tmp_path)
    left, held, young = (tmp_path / f"{sglang.PREFIX}{name}" for name in ("left", "held", "young"))
    for directory in (left, held, young):
        directory.mkdir()
        (directory / "weights").write_text("x")
    (left / ".lock").touch()
    with (held / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sglang.clean_memory()
        assert not left.exists() and held.exists() and young.exists()
