"""Makes, checks and measures problem sets: python -m capcur_jax.data COMMAND --help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from capcur_jax.errors import InputError
from capcur_jax.records import command_line, streams
from capcur_jax.records.terminal import files_explained

# Each is a module of capcur_jax.curation.commands with `add_arguments(parser)` and `run(arguments) -> dict`.
COMMANDS = {
    "build": "a problem file from a public data set's own files",
    "check": "what a problem file holds: counts, duplicates, broken images, overlong prompts, histograms",
    "split": "train, validation and test by the hash of the images",
    "synthesize": "perception questions from captions, written by a language model",
    "filter": "keeps the questions that filter models answer right from the caption and wrong from the image",
    "difficulty": "pass rates of a model on each problem",
    "contamination": "what a training set shares with evaluation sets",
    "card": "a page about a problem set: counts and examples with their pictures",
}
GOING_ON = ("synthesize", "filter", "difficulty")  # where they were stopped; the others write only at the end


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its last line on stdout is a JSON object. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m capcur_jax.data", description=__doc__)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    module, chosen = command_line.chosen_command(parser, COMMANDS, "capcur_jax.curation.commands", arguments)
    try:
        with files_explained():
            result = module.run(chosen)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = chosen.command in GOING_ON
        print(f"stopped; the same command {'goes on' if goes_on else 'starts anew'}", file=sys.stderr)
        return 130
    code = result.pop("exit_code", 0)
    print(json.dumps(result, ensure_ascii=False))
    return code


if __name__ == "__main__":
    streams.prepare()
    sys.exit(main())
