"""Runs the notebooks and writes them back with their outputs, without what differs from run to run.

python notebooks/refresh.py [grpo_by_hand.ipynb ...]     # all of them by default; pip install -e '.[notebooks]' before

To be run after a notebook was edited: a test compares what a fresh run gives with what is stored.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
PAGES = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 3600  # for one cell: against one that hangs, not one that waits for others on the machine
# The same whoever ran it last.
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def read(page: Path) -> NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(page, as_version=4)


def run(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """A copy that ran in `folder`, from a fresh kernel. Raises CellExecutionError, which has the traceback."""
    copy = nbformat.from_dict(notebook)
    return NotebookClient(
        copy, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()


def clean(notebook: NotebookNode) -> NotebookNode:
    """A copy without times, versions and what libraries write to stderr; cells are counted from 1."""
    copy, count = nbformat.from_dict(notebook), 0
    copy.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in copy.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _joined(output for output in cell.outputs if output.get("name") != "stderr")
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "metadata" in output:
                output.metadata = NotebookNode()
    return copy


def _joined(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Outputs with what was printed in one piece: where a kernel sends it in several is chance."""
    found: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def main(names: list[str]) -> None:
    for page in [FOLDER / name for name in names] or PAGES:
        nbformat.write(clean(run(read(page), FOLDER)), page)
        print(f"{page.name}: {page.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
