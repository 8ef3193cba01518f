"""The benchmark that a card is asked with: every part runs at tiny sizes here, and a part that fails is told of."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import on_card
import pytest
from absl import flags

SCRIPT = Path(on_card.__file__)


@pytest.mark.e2e
@pytest.mark.parametrize("part", on_card.PARTS)
def test_a_part_runs_small(part, tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--small", f"--one={part}:{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert found and all(math.isfinite(value) and value > 0 for value in found.values())
    # bfloat16 has 8 bits of precision: a wrong mask is off by more.
    assert all(value < 0.05 for name, value in found.items() if name.startswith("error"))


def test_a_part_that_fails_is_told_of_with_its_last_words(tmp_path, capsys):
    flags.FLAGS.mark_as_parsed()
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no plan for this graph')")
    assert on_card.ask(str(broken), "rows", tmp_path, 60) is None
    told = capsys.readouterr().out
    assert "rows: FAILED with exit status 1" in told and "no plan for this graph" in told


def test_a_part_that_hangs_is_ended(tmp_path, capsys):
    flags.FLAGS.mark_as_parsed()
    hanging = tmp_path / "hanging.py"
    hanging.write_text("import time; time.sleep(60)")
    assert on_card.ask(str(hanging), "rows", tmp_path, 1) is None
    assert "rows: FAILED, not done after 1 s" in capsys.readouterr().out
