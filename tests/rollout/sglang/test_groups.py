"""Tests of the real servers run in one worker."""

import inspect
import re
import subprocess
import sys

from tests.rollout.sglang import conftest

HERE = """

@pytest.fixture
def sglang_python():
    return ""
"""
TESTS = """
import pytest

@pytest.mark.parametrize("number", range(8))
def test_served(number, sglang_python, request):
    assert request.node.get_closest_marker("sglang")

def test_other(request):
    assert not request.node.get_closest_marker("sglang")
"""


def test_they_are_marked_and_one_group(tmp_path):
    """pytest 9.2.0 with pytest-xdist 3.8.0 spreads groups over all workers without a word (pytest-xdist #1386)."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = sglang\n")
    (tmp_path / "conftest.py").write_text(
        "import pytest\n\n" + inspect.getsource(conftest.pytest_collection_modifyitems) + HERE
    )
    (tmp_path / "test_it.py").write_text(TESTS)
    line = [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    workers = re.findall(r"\[(gw\d)\].* PASSED \S+::test_served", done.stdout)
    assert len(workers) == 8 and len(set(workers)) == 1
