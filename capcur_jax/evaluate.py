"""Scores models on benchmarks: python -m capcur_jax.evaluate [COMMAND] --help; --list names the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from capcur_jax.errors import InputError
from capcur_jax.records import streams

# Each is a module of capcur_jax.evaluation.commands with `add_arguments(parser)` and `run(arguments) -> dict`.
COMMANDS = {
    "score": "scores recorded predictions, without any model",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its last line on stdout is a JSON object. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--list"]:
        from capcur_jax.evaluation.commands import listing

        print("\n".join(listing.lines()))
        return 0
    parser = argparse.ArgumentParser(prog="python -m capcur_jax.evaluate", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the benchmarks: rows, files, where from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if arguments[:1] == [name]:  # the others' modules are not imported: some of them bring JAX
            module = importlib.import_module(f"capcur_jax.evaluation.commands.{name}")
            module.add_arguments(command)
    chosen = parser.parse_args(arguments)
    try:
        result = module.run(chosen)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    return 0


if __name__ == "__main__":
    streams.prepare()
    sys.exit(main())
