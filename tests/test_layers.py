"""The house's layers: a module imports from the rooms below its own alone. The commands may import anything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "capcur_jax"
LAYERS = """
    main
    train
    results ablations
    run grid
    curation plan generate evaluate checks
    evaluation
    policy learner presets
    rollout
    rewards schedule
    data
    answers
    models
    checkpoints report hub
    devices records
    workers files interruption
    bounds
    errors axes
"""  # CONTRIBUTING.md explains them
HEIGHT = {room: -number for number, line in enumerate(LAYERS.split("\n")) for room in line.split()}


def upward(room: str, code: str) -> list[str]:
    """The imports of the package in a module of `room` that do not go down, each with its line."""
    found = []
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names] if node.level == 0 else [f"capcur_jax.{room}"]
        for other in {name.split(".")[1] for name in names if name.startswith("capcur_jax.")} - {room}:
            if HEIGHT[other] >= HEIGHT[room]:
                found.append(f"line {node.lineno}: {ast.unparse(node)} ({room} is not above {other})")
    return found


def test_imports_go_down():
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if file.name not in ("__main__.py", "__init__.py"):
            found += [f"{file.relative_to(PACKAGE.parent)} {line}" for line in upward(room, file.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("planted", [
    "from capcur_jax.run import Run", "import capcur_jax.train", "from capcur_jax import results",
    "def f():\n    from capcur_jax.evaluation import heldout", "from capcur_jax.run import (\n    Run,\n)",
])  # fmt: skip
def test_an_upward_import_is_found(planted):
    (line,) = upward("rollout", planted)
    assert line.startswith("line ") and "rollout is not above" in line
    assert not upward("rollout", "from capcur_jax.data import prompts\nfrom capcur_jax.rollout.engine import Engine")


def test_few_files_lie_at_the_root():
    assert len([file for file in PACKAGE.iterdir() if file.is_file()]) <= 18
