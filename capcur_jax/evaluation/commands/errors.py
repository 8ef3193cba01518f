"""`errors`: what kind of error the wrong answers of an evaluation make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks.base import MODES
from capcur_jax.evaluation.errors import CLASSES, FILE, PAPER, SHOW
from capcur_jax.records.command_line import add_judge, at_least

WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", help="an evaluation (its --workdir), or a training run: its final one")
    add_judge(parser)
    add("--show", choices=SHOW, default=SHOW[0], help="what the judge sees of the figure (default: %(default)s)")
    add("--mode", choices=MODES, default=MODES[0], help="whose rules say what is wrong (default: %(default)s)")
    add("--benchmarks", default="", metavar="A,B", help="some of them (default: all)")
    add("--limit", type=at_least(0), default=0, metavar="N", help="wrong rows of each, drawn by hash (default: all)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the table, and writes DIR/errors.json. Without a judge: what the run's counterfactual says."""
    from capcur_jax.evaluation import errors, folders, judge, page
    from capcur_jax.evaluation.commands import counterfactual
    from capcur_jax.records import jsonl
    from capcur_jax.records.terminal import Progress

    folder = folders.read(arguments.folder)
    model = judge.model_of(arguments.judge, arguments.judge_model, arguments.judge_key_variable)
    told = counterfactual.read(folder.path)
    if model is None:
        return _without(folder.path, told)
    names = _chosen(folder, arguments.benchmarks)
    drawn, counts = {}, {}
    for name in names:
        rows = errors.wrong(folder.answered[name], arguments.mode)
        drawn[name], counts[name] = errors.drawn(rows, arguments.limit), len(rows)
    result: dict[str, Any] = {"rows": {}, "benchmarks": {}}
    with (
        Progress("errors", sum(map(len, drawn.values()))) as progress,
        judge.Judge(model, folder.path / judge.FILE, progress.advance_by) as asked,
    ):
        for name, rows in drawn.items():
            found = errors.classify(rows, asked, arguments.show, _facts)
            result["rows"][name] = {one.row.index: error for one, error in zip(rows, found, strict=True) if error}
            result["benchmarks"][name] = errors.summary(rows, found, counts[name])
        described = asked.described()
    everything = [one for rows in drawn.values() for one in rows]
    all_found = [result["rows"][name].get(one.row.index) for name, rows in drawn.items() for one in rows]
    result["all"] = errors.summary(everything, all_found, sum(counts.values()))
    result |= {
        "mode": arguments.mode, "show": arguments.show, "judge": described | {"prompts": errors.VERSION},
        "definition": CLASSES, "paper": PAPER,
    }  # fmt: skip
    jsonl.write_json_atomic(folder.path / FILE, result)
    page.write(folder.path)
    _print(result, told)
    first, anywhere = (result["all"][key]["perception"] for key in ("first", "anywhere"))
    return {
        "errors": str(folder.path / FILE), "classified": result["all"]["classified"],
        "undecided": result["all"]["undecided"], "perception": {"first": first, "anywhere": anywhere},
        "judge": described, "paper": PAPER["share"],
    }  # fmt: skip


def _chosen(folder: Any, benchmarks: str) -> list[str]:
    names = [name for name in benchmarks.split(",") if name] or list(folder.answered)
    if missing := [name for name in names if name not in folder.answered]:
        raise InputError(f"{folder.path} has no {', '.join(missing)}; it has {', '.join(folder.answered)}")
    return names


def _facts(one: Any) -> str:
    from capcur_jax.evaluation.counterfactual import facts_text

    return facts_text(one.row.index, one.row.facts.get("caption"), one.row.images)


def _without(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Without a judge the counterfactual alone says what can be said."""
    if not told:
        raise InputError(
            f"{folder}: no judge (--judge) says of which kind the errors are, and no counterfactual is kept here: give "
            "a judge, or ask with `counterfactual --workdir`; runs do where evaluation.counterfactual is above 0"
        )
    _print({}, told)
    return {"judge": "none", "counterfactual": told["sets"]}


def _print(result: dict[str, Any], told: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    from capcur_jax.evaluation.commands.counterfactual import show
    from capcur_jax.records.tables import titled

    console = Console(stderr=True, width=WIDTH, highlight=False)
    if result:
        whole = result["all"]
        title = f"Wrong answers by kind of error, % of {whole['classified']:,} classified"
        rows = [(name, *_shares(whole["first"][name]), *_shares(whole["anywhere"][name])) for name in CLASSES]
        console.print(titled(title, ["kind", "first error", "95 %", "anywhere", "95 % of it"], rows))
        judge, spent = result["judge"], result["judge"]["spent"]
        saw = ", ".join(f"{count:,} {what}" for what, count in whole["judge saw"].items())
        said = [
            f"Judge {judge['judge']}, prompts {judge['prompts']}, saw: {saw}. Undecided: {whole['undecided']:,}.",
            f"{spent['calls']:,} calls, {spent['prompt_tokens'] + spent['tokens']:,} tokens.",
            f"The paper: {PAPER['share']} % are perception errors, of {PAPER['of']}. Not known: {PAPER['not known']}.",
            f"Perception: {CLASSES['perception']}. All definitions are in {FILE}.",
        ]
        for line in said:
            console.print(Text(line), soft_wrap=False)
        console.print()
    if told:
        show(told)


def _shares(found: dict[str, Any]) -> tuple[str, str]:
    if not found["share"]:
        return "-", ""
    share, low, high = (100 * value for value in found["share"])
    return f"{share:.1f}", f"{low:.1f} {high:.1f}"
