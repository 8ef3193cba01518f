"""python -m capcur_jax.data build NAME --input DIR --output FILE."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from capcur_jax.curation.commands.options import output_file
from capcur_jax.data.rows import FORMATS, Tally, write_rows
from capcur_jax.data.sources import published
from capcur_jax.errors import InputError
from capcur_jax.records import terminal

SHOWN = 5  # drops that are named one by one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "docs/data_sources.md names the files of each set, where they come from and their licences."
    parser.add_argument("name", metavar="NAME", choices=published.NAMES, help=", ".join(published.NAMES))
    parser.add_argument("--input", metavar="DIR", required=True, help="folder with the set's files as published")
    parser.add_argument("--output", metavar="FILE", required=True, help=f"{' or '.join(FORMATS)}; replaced as a whole")
    parser.add_argument("--limit", metavar="N", type=int, help="stop after N kept rows, the published set's "
        "first: to try a set, not to test on, since many are sorted by source or kind")  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    output = output_file(arguments.output)
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit {arguments.limit}: give at least 1, or leave it out for all rows")
    reader, directory = published.reader(arguments.name), Path(arguments.input).absolute()
    if _read(output, directory, getattr(reader, "PATTERNS", ())):
        raise InputError(f"--output {output}: that is a name of the set's own files; give another, or another folder")
    tally = Tally(SHOWN)
    # Beside the file, and named as where its reader unpacks images, so that nothing is unpacked twice.
    images = Path(output.absolute()).with_name(f"{output.stem}-images")
    rows = terminal.counted(reader.read(directory, images), arguments.name)
    write_rows(output, itertools.islice(tally.kept(rows), arguments.limit))
    summary = tally.summary()
    terminal.stderr_console().print(terminal.kept_and_dropped(summary, tally.told()))
    drops = [f"{drop.where}: {drop.detail}" for drop in tally.examples]
    return summary | {"output": str(output), "first_drops": drops}


def _read(file: Path, directory: Path, patterns: Sequence[str]) -> bool:
    """Whether a reader that looks for these patterns in the folder would read the file, once it is there."""
    try:
        inside = file.resolve().relative_to(directory.resolve())
    except ValueError:
        return False
    return any(len(PurePath(pattern).parts) == len(inside.parts) and inside.match(pattern) for pattern in patterns)
