"""`counterfactual`: which errors are of perception, without a judge: the figures' facts as text, several samples."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from capcur_jax.errors import InputError
from capcur_jax.evaluation import counterfactual, judge, scoring, texts
from capcur_jax.evaluation.chosen import Chosen
from capcur_jax.evaluation.commands import run as asked
from capcur_jax.evaluation.commands.score import tell
from capcur_jax.records import jsonl
from capcur_jax.records.command_line import at_least

TEMPERATURE = 0.7
_WAYS = ("image", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    asked.add_arguments(parser)
    parser.set_defaults(temperature=TEMPERATURE)
    add = parser.add_argument
    add("--samples", type=at_least(2), default=counterfactual.SAMPLES, metavar="N",
        help="answers to a question with its image, and as many with its text (default: %(default)s)")  # fmt: skip
    add("--mode", choices=asked.MODES, default=asked.MODES[0], help="whose rules say what is right")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the table, and writes WORKDIR/counterfactual.json. Raises InputError."""
    if not arguments.temperature > 0:
        raise InputError("--temperature must be above 0: at 0 all samples of a question are one")
    judging = judge.model_of(arguments.judge, arguments.judge_model, arguments.judge_key_variable)
    setting = asked.opened(arguments)
    pairs, sets = {}, {}
    for one in setting.chosen:
        found, left_out = texts.told(one.benchmark, one.rows, setting.data)
        sets[one.benchmark.name] = {"left_out": dict(left_out)}
        if not found:
            tell(f"{one.benchmark.name}: no question has its figure in words ({dict(left_out)})")
            continue
        pairs[one.benchmark.name] = one.benchmark, found
    if not pairs:
        raise InputError("none of the benchmarks has texts of its figures; visonlyqa and mathverse have, and captions")
    several = [
        Chosen(benchmark, _several(found, arguments.samples), {}) for benchmark, found in pairs.values()
    ]  # fmt: skip
    settings = setting.settings | {"ways": list(_WAYS)}
    said = asked.ask(several, setting.answerer, settings, setting.workdir)
    if not said:  # not process 0
        asked.meet()
        return {}
    if failed := [each.failed for replies in said for each in replies if each.failed]:
        raise InputError(f"{len(failed)} questions have no reply (the first: {failed[0]}); the same command asks them")
    with contextlib.ExitStack() as closing:
        judged = closing.enter_context(judge.Judge(judging, setting.workdir / judge.FILE)) if judging else None
        for one, replies in zip(several, said, strict=True):
            right = _right(one, replies, arguments, setting.read, judged)
            clusters = [row.cluster or row.index for row, _ in pairs[one.benchmark.name][1]]
            sets[one.benchmark.name]["text"] = counterfactual.outcome(right[0], right[1], clusters)
    kept = {"temperature": setting.sampling.temperature, "sets": sets, "conditions": settings | {"read": setting.read}}
    kept["judge"] = judged.described() if judged else "none"
    jsonl.write_json_atomic(setting.workdir / counterfactual.FILE, kept | {"shown": counterfactual.shown(kept)})
    show(kept)
    asked.meet()
    return {"workdir": str(setting.workdir), "counterfactual": sets}


def show(kept: dict[str, Any]) -> None:
    """The table of what counterfactual.json holds, on stderr, 80 columns wide."""
    from rich.console import Console
    from rich.text import Text

    from capcur_jax.records.tables import titled

    console = Console(stderr=True, width=80, highlight=False)
    console.print(titled("The figure's facts as text", counterfactual.HEAD, counterfactual.table(kept)))
    console.print(Text(counterfactual.note(kept)))


def read(folder: Path) -> dict[str, Any]:
    """What is kept in a folder, {} where nothing is."""
    file = folder / counterfactual.FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _several(pairs: Any, samples: int) -> list[Any]:
    """All rows with images, then all with texts, each `samples` times under an index of its own."""
    return [
        dataclasses.replace(row, index=f"{row.index} {way} {number}")
        for way, rows in zip(_WAYS, zip(*pairs, strict=True), strict=True)
        for row in rows
        for number in range(samples)
    ]


def _right(one: Chosen, said: Any, arguments: argparse.Namespace, read: str, judged: Any) -> np.ndarray:
    """[ways, questions, samples], 0 or 1."""
    plain = dataclasses.replace(one.benchmark, metrics=lambda rows, verdicts, mode: {"score": None})
    scored = scoring.score(plain, one.rows, [each.reply() for each in said], arguments.mode, read, judged)
    right = np.array([float(verdict.credit >= 1) for verdict in scored.verdicts])
    return right.reshape(len(_WAYS), -1, arguments.samples)
