"""python -m capcur_jax.data synthesize: captions in, perception questions out."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from capcur_jax.curation import perception
from capcur_jax.curation.commands.options import journal_file, output_file
from capcur_jax.data.rows import Tally, read_rows, write_rows
from capcur_jax.errors import InputError, RolloutError
from capcur_jax.records import terminal
from capcur_jax.records.command_line import add_server, at_least, server_settings
from capcur_jax.records.journal import Journal
from capcur_jax.rollout.chat import Chat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="caption rows (.jsonl, .parquet): `response`, and one image")
    add("--output", required=True, metavar="FILE", help="the questions (.jsonl, .parquet); FILE.journal.jsonl beside "
        "it keeps what was answered, and a later run goes on from there")  # fmt: skip
    add("--address", required=True, action="append", metavar="URL",
        help="an OpenAI-compatible server, http://HOST:PORT; repeat it for several with the same model")  # fmt: skip
    add("--model", required=True, metavar="NAME", help="the name under which the server has the model")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s")
    add("--max_tokens", type=at_least(1), default=512, metavar="N", help="of a reply (default: %(default)s)")
    add("--limit", type=at_least(0), default=0, metavar="N", help="take N captions, drawn by the hash of their ids "
        "(default: all)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the options' order (default: %(default)s)")
    add_server(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns rows, kept, dropped by reason, asked and repaired, and how often each letter is right."""
    output = output_file(arguments.output, arguments.input)
    model, tokens, temperature = arguments.model, arguments.max_tokens, arguments.temperature
    if not 0 <= temperature < 10:
        raise InputError(f"--temperature {temperature}: give a number from 0")
    chat = functools.partial(Chat, arguments.address, model, **server_settings(arguments))
    tally, counts = Tally(), perception.Counts()
    with Journal(journal_file(output), perception.settings(model, temperature, tokens)) as journal:
        rows = perception.synthesize(
            read_rows(Path(arguments.input)),
            journal,
            chat,
            file=arguments.input,
            model=model,
            temperature=temperature,
            max_tokens=tokens,
            limit=arguments.limit,
            seed=arguments.seed,
            counts=counts,
        )
        try:
            write_rows(output, tally.kept(rows))
        except RolloutError as error:
            raise InputError(str(error)) from None
    terminal.stderr_console().print(terminal.kept_and_dropped(tally.summary(), tally.told()))
    made = {"asked": counts.asked, "requests": counts.requests, "repaired": counts.repaired}
    return tally.summary() | made | {"letters": dict(counts.letters), "output": str(output)}
