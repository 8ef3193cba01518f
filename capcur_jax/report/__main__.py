"""Writes the report of a run, or of a grid of runs, again.

python -m capcur_jax.report WORKDIR                       report.html of a run
python -m capcur_jax.report WORKDIR                       of a grid: report.html and tables.md, the paper's tables
python -m capcur_jax.report DIR ROW=DIR ... --output=DIR  the same of several grids and runs; docs/ablations.md
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from capcur_jax.errors import InputError
from capcur_jax.grid.rows import ROWS
from capcur_jax.records import streams
from capcur_jax.report.run import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files and prints their paths. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m capcur_jax.report", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("places", nargs="+", metavar="DIR", help="--workdir of a run or of a grid; ROW=DIR names a row")
    parser.add_argument(
        "--output", default="", metavar="DIR", help="folder for a grid's files (default: the work directory)"
    )
    options = parser.parse_args(arguments)
    try:
        for path in _write(options.places, options.output):
            print(path)
    except (FileNotFoundError, ValueError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(places: Sequence[str], output: str) -> Sequence[Path]:
    folder = Path(output or places[0])
    if not output:
        if len(places) > 1 or places[0].partition("=")[0] in ROWS:
            raise InputError("several places, or ROW=DIR: give --output=FOLDER for report.html and tables.md")
        if (folder / "metrics.jsonl").is_file() or not any(folder.glob("*/seed*/metrics.jsonl")):
            return [write_report(folder)]
    from capcur_jax.grid.report import page  # here: a run's report needs no evaluations

    return page.write(places, folder)


if __name__ == "__main__":
    streams.prepare()
    sys.exit(main())
