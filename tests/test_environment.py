"""What the processes that tests start find (environment.py)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

FINDS = "import importlib.util; print(importlib.util.find_spec('torch') is not None)"


def test_processes_of_this_python_find_no_torch_and_others_do(monkeypatch):
    assert importlib.util.find_spec("torch")  # the parity tests need it here

    def finds() -> bool:
        return subprocess.run([sys.executable, "-c", FINDS], capture_output=True, text=True).stdout == "True\n"

    assert not finds()
    monkeypatch.setenv("CAPCUR_TESTS", "/elsewhere")  # what another environment's Python, such as SGLang's, would see
    assert finds()
