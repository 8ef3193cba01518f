"""Options that commands share."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags

NO_CONFIG = (
    "no config: give one of configs/, such as --config=configs/staged.py; then any of its keys can be set, "
    "--config.seed=1. --help lists the other arguments"
)


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
    add("--api_key_variable", default="", metavar="NAME",
        help="environment variable that holds the servers' API key (default: none is sent)")  # fmt: skip


def server_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_server` say, as arguments of `rollout.chat.Chat`."""
    return {
        "concurrency": arguments.concurrency,
        "timeout_s": arguments.timeout,
        "retries": arguments.retries,
        "key_variable": arguments.api_key_variable,
    }


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Which judge decides."""
    add = parser.add_argument
    add("--judge", default="none", metavar="ADDRESS",
        help="an OpenAI-compatible address, anthropic, anthropic:ADDRESS, or none (default)")  # fmt: skip
    add("--judge_model", default="", metavar="NAME", help="the name under which the judge is served")
    add("--judge_key_variable", default="", metavar="NAME",
        help="environment variable that holds its API key (anthropic: ANTHROPIC_API_KEY)")  # fmt: skip


def chosen_command(
    parser: argparse.ArgumentParser, texts: Mapping[str, str], package: str, arguments: Sequence[str]
) -> tuple[ModuleType, argparse.Namespace]:
    """The module of the command that the arguments name, and what they set; ends the process where they are wrong.

    Args:
      texts: what each command does, by name.
      package: where the modules lie, each with `add_arguments`.
    """
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = ModuleType("none")  # argparse ends the process before it is used
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if arguments[:1] == [name]:  # the others' modules are not imported: some of them bring JAX
            module = importlib.import_module(f"{package}.{name}")
            module.add_arguments(command)
    chosen, rest = parser.parse_known_args(arguments)
    if rest and not hasattr(chosen, "config"):
        parser.error(f"unknown argument {rest[0]}")
    chosen.overrides = rest  # --config.key=value, of a command that takes a config
    return module, chosen


def mistyped(error: flags.Error, values: flags.FlagValues) -> str:
    """What is wrong with a command line, and what to write instead. `values`: its flags, `config` among them."""
    if not isinstance(error, flags.UnrecognizedFlagError):
        return str(error)
    if error.flagname.startswith("config.") and values["config"].value is None:
        return NO_CONFIG
    meant = str(error).partition("Did you mean: ")[2].removesuffix(" ?")
    return (
        f"unknown argument --{error.flagname}{f' (did you mean --{meant}?)' if meant else ''}; settings look like "
        "--config.seed=1, and --help lists the other arguments"
    )
