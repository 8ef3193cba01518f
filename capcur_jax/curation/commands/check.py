"""`check`: what problem files hold, and what in them a run could not use."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

from capcur_jax.records import terminal
from capcur_jax.records.command_line import at_least
from capcur_jax.records.tables import titled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="files of rows: JSON lines or Parquet (docs/data.md)")
    add(
        "--checkpoint",
        default="",
        metavar="DIR",
        help="whose tokenizer and image processor count tokens, a directory or OWNER/NAME on the Hub (default: the one "
        "that comes with the package)",
    )
    add(
        "--max_tokens",
        type=at_least(1),
        default=2048,
        metavar="N",
        help="longer prompts are overlong (default: %(default)s)",
    )
    add(
        "--min_pixels",
        type=at_least(0),
        default=0,
        metavar="N",
        help="smaller images are enlarged (0: the checkpoint's own)",
    )
    add(
        "--max_pixels",
        type=at_least(0),
        default=0,
        metavar="N",
        help="larger images are reduced (0: the checkpoint's own)",
    )
    add(
        "--instruction",
        choices=("suffix", "system", "none"),
        default="suffix",
        help="where the training's instruction stands: after the question, in a system turn, or nowhere "
        "(default: %(default)s)",
    )
    add("--images", metavar="DIR", help="folder for images that lie in the rows (default: none is kept)")
    add(
        "--examples",
        type=at_least(0),
        default=5,
        metavar="N",
        help="findings of each sort that are named (default: %(default)s)",
    )
    add("--json", action="store_true", help="no tables, only the JSON line")
    add(
        "--strict",
        action="store_true",
        help="exit code 1 where a file has no row, a row is dropped or could not be used, an id is in two files, or "
        "answers conflict",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    # Late: --help needs no transformers.
    from capcur_jax.curation.checking import check
    from capcur_jax.data.prompts import PromptBuilder
    from capcur_jax.data.row_images import IMAGES_VARIABLE
    from capcur_jax.hub import download
    from capcur_jax.models.inputs import Processor
    from capcur_jax.presets import TINY_CHECKPOINT

    checkpoint = download.checkpoint(arguments.checkpoint or TINY_CHECKPOINT, "--checkpoint", weights=False)
    processor = Processor.from_directory(checkpoint, arguments.min_pixels, arguments.max_pixels)
    builder = PromptBuilder(processor, arguments.instruction, sys.maxsize, sys.maxsize)
    with tempfile.TemporaryDirectory(prefix="capcur-check-") as folder:
        result = check(
            arguments.files,
            builder.measure,
            arguments.max_tokens,
            examples=arguments.examples,
            images=arguments.images or os.environ.get(IMAGES_VARIABLE) or folder,
            along=lambda rows: terminal.counted(rows, "rows"),
        )
    result["checkpoint"] = os.path.abspath(checkpoint)
    if not arguments.json:
        _show(result)
    return {**result, "exit_code": int(arguments.strict and bool(_faults(result)))}


def _faults(result: dict[str, Any]) -> dict[str, int]:
    """What --strict does not let pass: rows by fault. Equal questions with equal answers are no fault."""
    faults = {
        "files without a row": len(result["empty_files"]),
        "dropped": sum(result["dropped"].values()),
        "same id in another file": result["duplicates"]["same_id"]["rows"],
        "same question and images, another answer": result["duplicates"]["conflicting_answers"]["rows"],
        "broken images": result["broken_images"]["rows"],
        "unusable prompts": result["unusable_prompts"]["rows"],
        f"prompts over {result['overlong_prompts']['max_tokens']:,} tokens": result["overlong_prompts"]["rows"],
        "unanswerable": result["unanswerable"]["rows"],
    }
    return {name: count for name, count in faults.items() if count}


def _show(result: dict[str, Any]) -> None:
    console = terminal.stderr_console()
    rows = {"rows": result["rows"], "kept": result["kept"], "usable": result["usable"], **_faults(result)}
    if result["flawed_images"]["rows"]:
        rows["flawed images, as viewers show them"] = result["flawed_images"]["rows"]
    rows["same question and images, equal answer"] = (
        result["duplicates"]["same_question"]["rows"] - result["duplicates"]["conflicting_answers"]["rows"]
    )
    console.print(titled("Rows", ("", "rows"), rows.items()))
    for name, counts in result["counts"].items():
        if set(counts) - {"(none)"}:
            console.print(titled(f"By {name.replace('_', ' ')}", (name.replace("_", " "), "rows"), counts.items()))
    for title in ("dropped", "repaired"):
        if result.get(title):
            console.print(titled(title.capitalize(), ("what", "rows"), result[title].items()))
    examples = [(drop["where"], f"{drop['reason']}: {drop['detail']}") for drop in result["dropped_examples"]]
    examples += [(example["where"], example["detail"]) for example in result.get("repaired_examples", ())]
    examples += [(file, "no row; give a file with rows") for file in result["empty_files"]]
    names = ("broken_images", "flawed_images", "unusable_prompts", "overlong_prompts", "unanswerable")
    for section in (*result["duplicates"].values(), *(result[name] for name in names)):
        examples += [(example["where"], example["detail"]) for example in section["examples"]]
    if examples:
        console.print(titled("Examples", ("where", "what"), examples))
    histograms = {
        "Prompt tokens": result["prompt_tokens"],
        "Images, longer side in pixels": result["images"]["longer_side"],
        "Pass rate": result["pass_rate"],
    }
    for title, values in histograms.items():
        if values["count"]:
            title += f" (median {values['median']:,g}, 95 % {values['p95']:,g}, largest {values['max']:,g})"
            console.print(terminal.bars(title, values["histogram"]))
