"""Scores models on benchmarks: python -m capcur_jax.evaluate [COMMAND] --help; --list names the benchmarks.

Without a COMMAND a model is asked: --benchmarks=NAME,... --checkpoint=DIR, or --address=URL --model=NAME.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.records import command_line, streams
from capcur_jax.records.terminal import files_explained

# Each is a module of capcur_jax.evaluation.commands with `add_arguments(parser)` and `run(arguments) -> dict`.
COMMANDS = {
    "run": "asks a model about benchmarks and scores its replies: what is done without a command",
    "score": "scores recorded predictions, without any model",
    "compare": "whether evaluations differ by more than chance, on the questions that they share",
    "counterfactual": "which errors are of perception: the figures' facts as text in place of the images",
    "errors": "what kind of error wrong answers make, by a judge or by the figures' facts as text",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its last line on stdout is a JSON object. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--list"]:
        from capcur_jax.evaluation.commands import listing

        print("\n".join(listing.lines()))
        return 0
    if arguments and arguments[0].startswith("--") and arguments[0] not in ("--help", "--list"):
        arguments.insert(0, "run")
    parser = argparse.ArgumentParser(prog="python -m capcur_jax.evaluate", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the benchmarks: rows, files, where from")
    module, chosen = command_line.chosen_command(parser, COMMANDS, "capcur_jax.evaluation.commands", arguments)
    try:
        with files_explained():
            result = module.run(chosen)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RolloutError as error:  # a server or a judge that went away: what was answered is kept
        print(f"error: {error}; the same command with its --workdir goes on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with its --workdir goes on", file=sys.stderr)
        return 130
    print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    return 0


if __name__ == "__main__":
    streams.prepare()
    sys.exit(main())
