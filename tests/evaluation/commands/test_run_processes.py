"""Two processes evaluate one checkpoint: each asks its share, process 0 writes, and a later command alone goes on."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import write_rows
from tests.conftest import random_image

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.e2e


def together(processes: int, *arguments: str) -> list[str]:
    """What each of so many processes printed on stdout."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    joined = [f"--coordinator=localhost:{port}", f"--process_count={processes}"] if processes > 1 else []
    numbered = lambda i: [f"--process_id={i}"] if joined else []  # noqa: E731
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "capcur_jax.evaluate", *arguments, *joined, *numbered(i)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        )
        for i in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs
    return [out for out, _ in outputs]


def test_processes_answer_as_one_does(checkpoint, tmp_path):
    random_image(32, 32).save(tmp_path / "a.png")
    rows = [Problem(f"q{n}", f"Is it {n}?", "yes", (str(tmp_path / "a.png"),) if n % 2 else ()) for n in range(11)]
    write_rows(tmp_path / "own.jsonl", rows)
    config = ["--config=configs/staged.py", "--config.rollout.slots=2", "--config.prompt.max_pixels=1024"]
    given = [f"--benchmarks={tmp_path / 'own.jsonl'}", f"--checkpoint={checkpoint}", "--max_new_tokens=4", *config]
    alone = together(1, *given, f"--workdir={tmp_path / 'alone'}", "--config.mesh.fsdp=1")
    both = together(2, *given, f"--workdir={tmp_path / 'both'}", "--config.mesh.data=2", "--config.mesh.fsdp=1")
    assert json.loads(both[0].splitlines()[-1])["benchmarks"] == json.loads(alone[0].splitlines()[-1])["benchmarks"]
    tables = [(tmp_path / name / "predictions" / "own.tsv").read_text() for name in ("alone", "both")]
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 12
    journal = tmp_path / "both" / "replies" / "own.jsonl"
    before = journal.read_bytes()
    together(1, *given, f"--workdir={tmp_path / 'both'}", "--config.mesh.fsdp=1")  # another layout: the same answers
    assert journal.read_bytes() == before
