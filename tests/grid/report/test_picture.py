"""The README's picture is drawn from a grid's files, and says what it lacks."""

from __future__ import annotations

import json
import shutil

import numpy as np
import picture
import PIL.Image
import pytest

from capcur_jax.grid.report import figures, gather


def test_it_is_drawn_of_staged_and_merged_runs(grid, tmp_path, capsys):
    file = tmp_path / "new" / "picture.png"
    assert picture.main([str(grid), f"--output={file}"]) == 0 and capsys.readouterr().out.strip() == str(file)
    with PIL.Image.open(file) as image:
        assert image.width > 1000 and len(set(image.convert("RGB").resize((300, 100)).getdata())) > 20


def test_its_points_are_those_of_the_summaries(grid):
    runs = gather.read([str(grid)]).of("staged")
    found = figures.moments(runs)
    assert found.steps == [0, 10, 20, 30] and [name for name, *_ in found.stages] == ["perception", "text", "visual"]
    for run, values in zip(runs, found.accuracy["visual"], strict=True):
        told = json.loads((run.folder / "summary.json").read_text())["accuracy"]["visual"]
        keys = ("base", "after_perception", "after_text", "after_visual")
        assert values == pytest.approx([100 * told[key] for key in keys])
    merged = figures.moments(gather.read([str(grid)]).of("merged"))
    assert merged.steps == [0, 30] and np.isfinite(merged.accuracy["text"]).all()


@pytest.mark.parametrize("rows", [("staged",), ("staged", "merged")])
def test_a_grid_without_what_it_shows_is_named(rows, grid, tmp_path, capsys):
    for row in rows:
        shutil.copytree(grid / row / "seed0", tmp_path / row / "seed0")
    if "merged" in rows:  # its base was not asked
        file = tmp_path / "merged/seed0/summary.json"
        summary = json.loads(file.read_text())
        del summary["accuracy"]["text"]["base"]
        file.write_text(json.dumps(summary))
    assert picture.main([str(tmp_path), f"--output={tmp_path / 'no.png'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no finished runs of merged" in error and not (tmp_path / "no.png").exists()
