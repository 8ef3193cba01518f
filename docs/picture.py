"""Draws the README's picture from a grid: held-out accuracy of base, staged and merged runs after each stage.

    python docs/picture.py runs/ablations [--output=docs/images/staged_against_merged.png]

Lines are means over the grid's finished runs, bands go from the lowest seed to the highest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from capcur_jax.errors import InputError
from capcur_jax.grid.report import figures, gather

PICTURE = Path(__file__).resolve().parent / "images" / "staged_against_merged.png"
ROWS = {"staged": ("#0b6e99", "o", "-"), "merged": ("#c4501b", "s", "--")}  # color, mark, line
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.alpha": 0.35, "figure.facecolor": "white",
}  # fmt: skip


def draw(places: Sequence[str], file: Path) -> None:
    """Writes the PNG. Raises InputError where a row has no finished run, or its runs were evaluated differently."""
    grid = gather.read(places)
    found = {}
    for row in ROWS:
        moments = figures.moments(grid.of(row)) if grid.of(row) else None
        if moments is None:
            raise InputError(
                f"{', '.join(places)}: no finished runs of {row} that were evaluated at the same moments; run "
                f"python -m capcur_jax.ablations --rows={','.join(ROWS)} first"
            )
        found[row] = moments
    sets = [name for name in found["staged"].accuracy if name in found["merged"].accuracy]
    if not sets:
        raise InputError(f"{', '.join(places)}: staged and merged runs were evaluated on no set in common")
    with rc_context(STYLE):
        figure = Figure(figsize=(3.1 * len(sets), 2.9), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(sets), sharex=True, squeeze=True))
        for panel, name in zip(panels, sets, strict=True):
            for row, (color, mark, line) in ROWS.items():
                steps, values = found[row].steps, found[row].accuracy[name]
                label = f"{row} ({len(values)} seeds)" if len(values) > 1 else f"{row} (one seed)"
                panel.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
                panel.plot(steps, values.mean(0), line, color=color, marker=mark, markersize=4, label=label)
            for stage, begin, end in found["staged"].stages:
                panel.axvline(end, color="0.75", linewidth=0.8, zorder=0)
                panel.text((begin + end) / 2, 1.0, stage, transform=panel.get_xaxis_transform(), ha="center",
                           va="bottom", fontsize=7.5, color="0.4")  # fmt: skip
            panel.set_title(f"{name} questions", loc="left", fontweight="bold", fontsize=10, pad=14)
            panel.set_xlabel("step (stages of the staged run above)" if panel is panels[len(panels) // 2] else "step")
        panels[0].set_ylabel("held-out accuracy, %")
        panels[0].legend(frameon=False, fontsize=8, loc="lower right")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", nargs="+", metavar="DIR", help="--workdir of a grid; or ROW=DIR of runs")
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="FILE", help="a .png (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        draw(options.places, options.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
