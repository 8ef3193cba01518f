"""Options that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable


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
