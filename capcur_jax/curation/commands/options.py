"""Options that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from capcur_jax.data.rows import FORMATS
from capcur_jax.errors import InputError


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return int(text)

    number.__name__ = "whole number"  # argparse's word for what it could not read
    return number


def seconds(text: str) -> float:
    """An argparse type: a time above 0, of a day at most."""
    if not 0 < float(text) <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is no time from 0 to 86400 s")
    return float(text)


def add_server(parser: argparse.ArgumentParser) -> None:
    """How servers are asked: concurrency, time-out, retries, and the variable with the key."""
    add = parser.add_argument
    add("--concurrency", type=at_least(1), default=16, metavar="N", help="requests at a time (default: %(default)s)")
    add("--timeout", type=seconds, default=120.0, metavar="S", help="seconds for a reply (default: %(default)s)")
    add("--retries", type=at_least(0), default=6, metavar="N",
        help="further tries after time-outs, lost connections, 429 and 5xx (default: %(default)s)")  # fmt: skip
    add("--api-key-variable", default="", metavar="NAME",
        help="environment variable that holds the servers' API key (default: none is sent)")  # fmt: skip


def output_file(name: str, *inputs: str, option: str = "--output") -> Path:
    """The file of rows to write. Raises InputError now, not after hours of work, where it can't be written."""
    path = Path(name)
    if path.suffix not in FORMATS:
        raise InputError(f"{option} {path}: the name must end in {' or '.join(FORMATS)}")
    if path.is_dir():
        raise InputError(f"{option} {path}: a folder; give a file")
    not_among(path, inputs, option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}: its folder can't be made ({error.strerror}); give another") from None
    return path


def not_among(path: Path, others: Iterable[str], option: str) -> None:
    """Raises InputError where a file to write is one that the command reads, or writes besides."""
    if any(Path(other).resolve() == path.resolve() for other in others):
        raise InputError(f"{option} {path}: the command names that file already; give another")


def journal_file(output: Path, part: str = "") -> Path:
    """The journal beside an output: OUTPUT.journal.jsonl, with a part's name before `journal`."""
    return output.with_name(".".join([output.name, *([part] if part else []), "journal.jsonl"]))
