"""`report.html` and `tables.md` of a grid, from what its runs left; no model is needed.

One file without scripts and network: filters are form elements and style sheets, as on an evaluation's page.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from capcur_jax.errors import InputError
from capcur_jax.files import write_atomically
from capcur_jax.grid.jobs import COMMANDS
from capcur_jax.grid.report import benchmarks, claims, examples, figures, more, tables
from capcur_jax.grid.report.gather import Grid, read
from capcur_jax.grid.report.tables import Table
from capcur_jax.records.text import visible
from capcur_jax.report.page import render

PAGE, TABLES = "report.html", "tables.md"


def write(places: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """Writes both files of the runs in these places into `folder`; returns their paths.

    Args:
      places: work directories of grids, folders of runs, or ROW=FOLDER.

    Raises:
      InputError: no runs, two of one row and seed, or files that can't be read.
    """
    grid = read(places)
    measured = benchmarks.Measured(grid)
    grid = dataclasses.replace(grid, notes=(*grid.notes, *measured.notes))
    measures = claims.Measures(grid)
    found = claims.judged(measures)
    missing, claimed = more.missing(grid), tables.claims(found)
    papers, errors = tables.papers(measures, measured), more.perception_errors(grid)
    further = [
        *([errors] if errors else []),
        more.kinds(grid),
        more.seen(grid),
        more.cost(grid),
        more.comparisons(measures),
    ]
    shown, of = examples.choose(grid)
    filters = {
        name: sorted({one.values[name] for one in shown if one.values[name]})
        for name in ("set", "outcome", "kind", "seed")
    }
    rows = list(dict.fromkeys([*grid.rows, *(line.row for table in papers for line in table.lines)]))
    title = folder.resolve().name
    html = render(
        "grid.html",
        title=f"{title}: grid report",
        name=title,
        facts=_facts(grid),
        notes=grid.notes,
        missing=missing,
        claims=claimed,
        claims_chart=figures.claims(found),
        papers=papers,
        curves=figures.curves(grid),
        further=further,
        rows=rows,
        examples=shown,
        of=of,
        filters=filters,
        numbers={key: {value: at for at, value in enumerate(values, 1)} for key, values in filters.items()},
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / PAGE, html.encode())
        write_atomically(
            folder / TABLES, _markdown(grid, title, places, [claimed, *papers, *further, missing]).encode()
        )
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error.strerror}); give another --output") from None
    return folder / PAGE, folder / TABLES


def _facts(grid: Grid) -> dict[str, str]:
    """What the tiles say."""
    seeds = sorted({run.seed for run in grid.runs})
    commits = sorted({str(run.versions.get("commit") or "not known")[:7] for run in grid.runs})
    return {
        "runs that count": f"{len(grid.runs)} of {len(grid.runs) + len(grid.others)}",
        "rows": str(len(grid.rows)),
        "seeds": ", ".join(map(str, seeds)),
        "questions": ", ".join(f"{name} {len(of):,}" for name, of in grid.clusters.items()),
        "commit": ", ".join(commits),
    }


def _markdown(grid: Grid, title: str, places: Sequence[str], made: Sequence[Table]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in _facts(grid).items() if value)
    notes = "\n".join(f"- {visible(note)}" for note in grid.notes)
    head = f"# {visible(title)}\n\n{facts}\n{notes}\n\n{_commands(grid, places)}\n\n"
    head += "In brackets: 95 % intervals, over seeds and questions.\n"
    return tables.markdown([table for table in made if table.lines], head)


def _commands(grid: Grid, places: Sequence[str]) -> str:
    """What made these runs, as far as their grids remember it, and makes this page of them."""
    files = [Path(place.partition("=")[2] or place) / COMMANDS for place in places]
    runs = [line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    return "\n".join(["```bash", *runs, f"python -m capcur_jax.report {shlex.join(places)}", "```"])
