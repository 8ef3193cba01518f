"""`split`: train, validation and test by the hash of the images."""

from __future__ import annotations

import argparse
from typing import Any

from capcur_jax.records import terminal
from capcur_jax.records.tables import titled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="file of rows")
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="gets train, validation and test: .parquet of a Parquet file, else .jsonl",
    )
    add(
        "--shares",
        nargs=3,
        type=float,
        default=(85.0, 5.0, 10.0),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="shares of the images (85 5 10, as in the paper)",
    )
    add("--salt", default="", metavar="TEXT", help="another text gives other splits")
    add("--images", metavar="DIR", help="folder for images that lie in the rows")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from capcur_jax.curation.splitting import split_file

    result = split_file(
        arguments.input,
        arguments.output,
        arguments.shares,
        arguments.salt,
        images=arguments.images,
        along=lambda rows: terminal.counted(rows, "rows"),
    )
    rows = [
        (split, count, result["images"][split], result["files"][split]) for split, count in result["splits"].items()
    ]
    console = terminal.stderr_console()
    console.print(titled("Splits", ("split", "rows", "images", "file"), rows))
    examples = [(drop["where"], drop["detail"]) for drop in result["dropped_examples"]]
    if examples:
        console.print(terminal.kept_and_dropped(result, examples))
    return result
