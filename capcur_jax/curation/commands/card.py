"""`card`: a page about a problem set."""

from __future__ import annotations

import argparse
from typing import Any

from capcur_jax.records import terminal
from capcur_jax.records.command_line import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files of rows")
    add("--output", required=True, metavar="PATH", help="a folder (gets card.html), or FILE.html")
    add("--title", default="", metavar="TEXT", help="the page's heading (default: the first file's name)")
    add(
        "--examples",
        type=at_least(0),
        default=12,
        metavar="N",
        help="rows shown with their pictures (default: %(default)s)",
    )
    add("--reports", nargs="+", default=[], metavar="FILE.json",
        help="what the commands that made the set printed: their rows, kept and dropped go onto the page")  # fmt: skip
    add("--images", metavar="DIR", help="folder for images that Parquet files hold as bytes")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from capcur_jax.curation.card import make_card
    from capcur_jax.curation.card_pages import card_file, write_card

    file = card_file(arguments.output)  # before the work, not after it
    card = make_card(
        arguments.input,
        arguments.title,
        arguments.examples,
        arguments.reports,
        images=arguments.images,
        along=lambda rows: terminal.counted(rows, "rows"),
    )
    write_card(card, file)
    return {**card.summary, "card": str(file)}
