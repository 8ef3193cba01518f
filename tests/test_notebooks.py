"""Every notebook runs from top to bottom, and what is stored of its outputs is small and of this notebook."""

from __future__ import annotations

import itertools
import json
import os
import re

import pytest

from notebooks import refresh
from tests.test_docs import faults

MOST_BYTES = 200_000
ABSOLUTE = re.compile(r"(?<![\w.:/}])/(?:home|root|tmp|work|usr|opt|var|Users)/|[A-Z]:\\\\")
PAGES = [pytest.param(page, marks=pytest.mark.xdist_group(page.stem), id=page.stem) for page in refresh.PAGES]


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook) -> list[list[str]]:
    """What each cell gives: texts, pictures, errors."""
    found = []
    for cell in code(notebook):
        given = []
        for output in cell.outputs:
            data = "+".join(sorted(output.get("data", {})))
            given.append(" ".join(filter(None, (output.output_type, output.get("name"), data))))
        found.append(given)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_it_runs_and_gives_what_is_stored(page, tmp_path, monkeypatch):
    """In a folder of its own, beside nothing. Figures may differ a little: programs are compiled otherwise here."""
    monkeypatch.setenv("PYTHONPATH", f"{refresh.FOLDER.parent}{os.pathsep}{os.environ['PYTHONPATH']}")
    stored = refresh.read(page)
    fresh = refresh.clean(refresh.run(stored, tmp_path))
    assert kinds(fresh) == kinds(stored), f"{page.name}: run notebooks/refresh.py {page.name}"


@pytest.mark.parametrize("page", refresh.PAGES, ids=lambda page: page.stem)
def test_what_is_stored_is_small_and_clean(page):
    stored = refresh.read(page)
    assert page.stat().st_size < MOST_BYTES
    assert stored == refresh.clean(stored), f"{page.name}: run notebooks/refresh.py {page.name}"
    given = list(itertools.chain(*kinds(stored)))
    assert any("image/png" in kind for kind in given)
    assert not any(kind.startswith("error") for kind in given)
    for cell in stored.cells:
        outputs = [
            {**output, "data": {**output.get("data", {}), "image/png": ""}} for output in cell.get("outputs", ())
        ]
        for text in (cell.source, json.dumps(outputs)):
            assert not ABSOLUTE.search(text), text


@pytest.mark.parametrize("page", refresh.PAGES, ids=lambda page: page.stem)
def test_what_it_names_is_there(page):
    stored = refresh.read(page)
    text = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    for cell in code(stored):
        for written in re.findall(r"^%%writefile (\S+)", cell.source):  # by the notebook itself
            text = text.replace(written, "")
    assert not faults(page, text)


def test_a_capability_takes_thirty_lines():
    """As own_capability.ipynb says: its three cells between the imports and the run."""
    rows, reward, stage = code(refresh.read(refresh.FOLDER / "own_capability.ipynb"))[1:4]
    for cell, name in ((rows, "problem"), (reward, "def score"), (stage, "presets.stage")):
        assert name in cell.source
    lines = "\n".join(cell.source for cell in (rows, reward, stage)).splitlines()
    assert len([line for line in lines if line.strip() and not line.startswith("%%")]) <= 30


def test_clean_leaves_nothing_of_a_run():
    notebook = refresh.nbformat.v4.new_notebook(metadata={"language_info": {"name": "python", "version": "3.1"}})
    cell = refresh.nbformat.v4.new_code_cell("1", metadata={"execution": {"iopub.execute_input": "now"}})
    cell.update(execution_count=7, outputs=[
        refresh.nbformat.v4.new_output("stream", name="stdout", text="a line\n"),
        refresh.nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        refresh.nbformat.v4.new_output("stream", name="stdout", text="and one that came later\n"),
        refresh.nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=7),
    ])  # fmt: skip
    notebook.cells.append(cell)
    (found,) = refresh.clean(notebook).cells
    assert (found.execution_count, found.metadata, len(found.outputs)) == (1, {}, 2)
    assert found.outputs[0].text == "a line\nand one that came later\n"
    assert found.outputs[1].execution_count == 1
    assert cell.execution_count == 7 and len(cell.outputs) == 4  # a copy was made
