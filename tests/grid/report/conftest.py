"""A grid's work directory as runs leave it, small, with figures that are drawn."""

from __future__ import annotations

import pytest

from benchmarks import grid_page
from capcur_jax.grid.report import page

ROWS = {"staged": 0.0, "merged": -0.8, "order_321": -0.3, "sft_perception": -0.3}


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """The folder; report.html and tables.md are written. Not to be changed."""
    folder = tmp_path_factory.mktemp("grids") / "grid"
    grid_page.make(folder, ROWS, range(3), questions=90)
    (folder / "difficulty" / "seed0").mkdir(parents=True)
    (folder / "difficulty" / "seed0" / "metrics.jsonl").write_text('{"type": "step", "step": 7}\n')
    page.write([str(folder)], folder)
    return folder
