"""python -m capcur_jax.data build NAME --input DIR --output FILE."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from capcur_jax.data.commands.options import output_file
from capcur_jax.data.problem import Problem
from capcur_jax.data.rows import FORMATS, Tally, write_rows
from capcur_jax.data.sources import published
from capcur_jax.errors import InputError

SHOWN = 5  # drops that are told one by one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "docs/data_sources.md names the files of each set, where they come from and their licences."
    parser.add_argument("name", metavar="NAME", choices=published.NAMES, help=", ".join(published.NAMES))
    parser.add_argument("--input", metavar="DIR", required=True, help="folder with the set's files as published")
    parser.add_argument("--output", metavar="FILE", required=True, help=f"{' or '.join(FORMATS)}; replaced as a whole")
    parser.add_argument("--limit", metavar="N", type=int, help="stop after N kept rows")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    output = output_file(arguments.output)
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit {arguments.limit}: give at least 1, or leave it out for all rows")
    tally = Tally(SHOWN)
    # Beside the file, and named as where its reader unpacks images, so that nothing is unpacked twice.
    images = Path(output.absolute()).with_name(f"{output.stem}-images")
    rows = published.reader(arguments.name).read(Path(arguments.input).absolute(), images)
    with _progress(arguments.name, tally) as shown:
        write_rows(output, shown(itertools.islice(tally.kept(rows), arguments.limit)))
    summary = tally.summary()
    _tell(summary)
    drops = [f"{drop.where}: {drop.detail}" for drop in tally.examples]
    return summary | {"output": str(output), "first_drops": drops}


@contextlib.contextmanager
def _progress(name: str, tally: Tally) -> Iterator[Any]:
    """Gives a function that passes problems on while the terminal shows how many rows were read."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name)

        def shown(problems: Iterable[Problem]) -> Iterator[Problem]:
            for problem in problems:
                yield problem
                if tally.rows % 64 == 0:
                    dropped = tally.dropped.total()
                    progress.update(task, description=f"{name}: {tally.rows:,} rows, {dropped:,} dropped")

        yield shown


def _tell(summary: dict[str, Any]) -> None:
    table = Table("", "rows", title=None)
    table.add_row("read", f"{summary['rows']:,}")
    table.add_row("kept", f"{summary['kept']:,}")
    for reason, count in summary["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    Console(stderr=True).print(table)
