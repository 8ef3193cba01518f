"""python -m capcur_jax.data filter: keeps questions answered right from the caption and wrong from the image."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from capcur_jax.curation import filter_models, perception_filter
from capcur_jax.curation.commands.options import journal_file, output_file
from capcur_jax.curation.filter_models import FilterModel, How
from capcur_jax.curation.perception_filter import KEPT
from capcur_jax.data.problem import Drop, stable_hash
from capcur_jax.data.rows import Tally, read_rows, write_rows
from capcur_jax.errors import InputError, RolloutError
from capcur_jax.records import terminal
from capcur_jax.records.command_line import add_server, at_least, server_settings
from capcur_jax.records.journal import Journal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="multiple-choice rows with an image and metadata.caption")
    add("--output", required=True, metavar="FILE", help="the rows that are kept (.jsonl, .parquet); journals beside it "
        "keep the replies, and a later run goes on from there")  # fmt: skip
    add("--keep_dropped", default="", metavar="FILE", help="the dropped rows, with what the models said")
    add("--model", required=True, action="append", metavar="SPEC",
        help="a filter model: served:URL,NAME behind an OpenAI-compatible server, or a checkpoint directory; repeat it "
        "for several, all of which must agree")  # fmt: skip
    add("--max_new_tokens", type=at_least(1), default=8, metavar="N", help="of a reply (default: %(default)s)")
    add("--batch", type=at_least(1), default=16, metavar="N", help="prompts that a local model reads at once (default: "
        "%(default)s)")  # fmt: skip
    add("--caption_chat", action="store_true", help="put the caption and question into a chat turn; by default the "
        "model continues the bare text, as in the paper's release")  # fmt: skip
    add("--downsample", type=at_least(1), default=1, metavar="N", help="make images N times smaller along each side; "
        "the release has 2 for DOCCI (default: %(default)s)")  # fmt: skip
    add("--max_pixels", type=at_least(0), default=0, metavar="N", help="shrink larger images (0: to the model's bound)")
    add_server(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns rows, kept, dropped by reason; the same of each model; and right and wrong of each of its passes."""
    output = output_file(arguments.output, arguments.input)
    others = None
    if arguments.keep_dropped:
        others = output_file(arguments.keep_dropped, arguments.input, arguments.output, option="--keep_dropped")
    how = How(
        max_new_tokens=arguments.max_new_tokens,
        downsample=arguments.downsample,
        max_pixels=arguments.max_pixels,
        batch=arguments.batch,
        served=server_settings(arguments),
    )
    models = filter_models.open_models(arguments.model, how)
    tally = Tally()
    read = map(perception_filter.readable, tally.kept(read_rows(Path(arguments.input))))
    rows = list(tally.passed(read))

    def journal(model: FilterModel) -> Journal:
        known = perception_filter.settings(model, how, arguments.caption_chat)
        return Journal(journal_file(output, _file_part(model.name)), known)

    try:
        found = perception_filter.judge(rows, models, journal, arguments.caption_chat)
    except RolloutError as error:
        raise InputError(str(error)) from None
    judged = list(tally.passed(found))
    counts = perception_filter.counted(judged, models)
    perception_filter.show(counts)
    for one in judged:
        if one.reason != KEPT:
            tally.drop(Drop(f"row {one.problem.id}", one.reason, ""))
    terminal.stderr_console().print(terminal.kept_and_dropped(tally.summary(), tally.told()))
    write_rows(output, (one.problem for one in judged if one.reason == KEPT))
    if others:
        write_rows(others, (one.problem for one in judged if one.reason != KEPT))
    passes = perception_filter.by_pass(judged, models)
    return tally.summary() | {"models": counts, "passes": passes, "output": str(output)}


def _file_part(name: str) -> str:
    """A model's name as part of a file's: readable, and no two alike."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40]
    return plain if plain == name else f"{plain}-{stable_hash(name) % 16**6:06x}"
