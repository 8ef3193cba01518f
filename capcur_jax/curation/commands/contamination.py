"""`contamination`: what a training set shares with evaluation sets."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from capcur_jax.curation.commands.options import not_among, output_file
from capcur_jax.errors import InputError
from capcur_jax.records import terminal
from capcur_jax.records.tables import titled

_SHOWN = 10  # pairs of the JSON line; --output has the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train", nargs="+", required=True, metavar="FILE", help="files of training rows")
    add("--against", nargs="+", required=True, metavar="FILE", help="files of evaluation rows")
    add(
        "--threshold",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="texts whose 5-word runs agree to this share (Jaccard) are near-duplicates (default: %(default)s)",
    )
    add("--output", metavar="REPORT.json", help="gets the report with the pairs")
    add("--remove", metavar="FILE", help="gets the training rows that share nothing (.jsonl or .parquet)")
    add(
        "--remove_look_alikes",
        action="store_true",
        help="with --remove: also leave out rows whose pictures look alike, which may be wrong",
    )
    add("--images", metavar="DIR", help="folder for images that Parquet files hold as bytes")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from capcur_jax.curation.contamination import compare, write_clean
    from capcur_jax.files import write_atomically

    read = (*arguments.train, *arguments.against)
    if arguments.remove:  # before the work, not after it
        output_file(arguments.remove, *read, option="--remove")
    if arguments.output:
        not_among(Path(arguments.output), [*read, *filter(None, [arguments.remove])], "--output")
    if not 0 < arguments.threshold <= 1:
        raise InputError(f"--threshold {arguments.threshold}: give a share above 0 and up to 1")
    report, pairs, kinds = compare(
        arguments.train, arguments.against, arguments.threshold, images=arguments.images, along=terminal.counted
    )
    if arguments.remove:
        cleaned = write_clean(
            arguments.train, arguments.remove, kinds, looks=arguments.remove_look_alikes, images=arguments.images
        )
        report["removed"] = {"file": arguments.remove, **cleaned}
    _show(report, pairs)
    if arguments.output:
        text = json.dumps({**report, "named_pairs": pairs}, ensure_ascii=False, indent=1) + "\n"
        write_atomically(Path(arguments.output), text.encode())
        report["report"] = arguments.output
    return {**report, "named_pairs": pairs[:_SHOWN]}


def _show(report: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
    console = terminal.stderr_console()
    rows = [*report["training_rows"].items(), ("only the question, with other images", report["same_text_only"])]
    console.print(titled("Training rows by the surest thing they share", ("", "rows"), rows))
    rows = [(file, *counts.values()) for file, counts in report["evaluation_rows"].items()]
    console.print(titled("Evaluation rows", ("file", "rows", "shared", "shared, or look alike"), rows))
    if pairs:
        rows = [
            (
                pair["kind"],
                pair["train"]["id"],
                pair["against"]["id"],
                f"{pair['text_similarity']:.2f}",
                pair.get("image_difference", ""),
            )
            for pair in pairs[:_SHOWN]
        ]
        head = ("kind", "training row", "evaluation row", "texts agree", "images differ")
        console.print(titled("First pairs", head, rows))
    if "removed" in report:
        cleaned = report["removed"]
        console.print(f"{cleaned['file']}:", markup=False, soft_wrap=True)
        console.print(terminal.kept_and_dropped(cleaned))
