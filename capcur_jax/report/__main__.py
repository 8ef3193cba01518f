"""Writes the report of a run again: python -m capcur_jax.report WORKDIR."""

import argparse
import sys
from collections.abc import Sequence

from capcur_jax.records import streams
from capcur_jax.report.run import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report of a work directory and prints its path. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m capcur_jax.report", description=write_report.__doc__)
    parser.add_argument("workdir", help="work directory of a run (its --workdir)")
    workdir = parser.parse_args(arguments).workdir
    try:
        print(write_report(workdir))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    streams.prepare()
    sys.exit(main())
