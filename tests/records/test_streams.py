"""Terminals without UTF-8 and pipes that nobody reads end no command with a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = """
import sys
from capcur_jax.records import streams
streams.prepare()
from capcur_jax.records.display import Display
display = Display()
display.plan({"Stages \\u2192": [{"stage": "\\u4e2d\\u6587", "steps": 3}]})
display.warn("caf\\u00e9")
for number in range(LINES):
    print("x" * 80)
print("end", file=sys.stderr)
"""


def start(lines):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    code = SHOWN.replace("LINES", str(lines))
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def test_characters_that_a_terminal_lacks_are_shown_by_their_codes():
    out, error = start(1).communicate(timeout=60)
    assert "\\u4e2d\\u6587" in out.decode("ascii") and "caf\\xe9" in out.decode("ascii"), error
    assert error.split() == [b"end"]


def test_a_closed_pipe_ends_the_output_and_not_the_work():
    process = start(10_000)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 0 and error.split() == [b"end"], error


@pytest.mark.parametrize("module", ["capcur_jax.main", "capcur_jax.data", "capcur_jax.generate", "capcur_jax.report"])
def test_every_command_is_prepared(module):
    """Its help, cut after the first line."""
    command = f"{sys.executable} -m {module} --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, cwd=ROOT, env={**os.environ, "LC_ALL": "C"})
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr, done.stderr
