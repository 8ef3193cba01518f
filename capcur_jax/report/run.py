"""`report.html` of a run: one file, without scripts and network, that opens in any browser.

    python -m capcur_jax.report WORKDIR

makes it again from the records in WORKDIR: metrics.jsonl, and rollouts.jsonl, summary.json, config.json and
versions.json where they are there. templates/run.html is what it looks like. Model output is untrusted: page.py
escapes all text, and a content security policy forbids scripts and loads from anywhere.
"""

import json
import pathlib
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from capcur_jax.records import jsonl, metrics
from capcur_jax.records.text import counted, is_number, moment_title, moments_of, number
from capcur_jax.report import charts, pictures
from capcur_jax.report.page import duration, render

MAX_PROMPTS = 18  # sampled prompts shown, over all stages
MAX_RESPONSES = 8  # of one prompt

Record = Mapping[str, Any]


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `workdir`/report.html from those of the run's records that are there, and returns its path.

    Raises:
      FileNotFoundError: without metrics.jsonl.
      ValueError: a broken record; names file and line.
    """
    workdir = pathlib.Path(workdir).absolute()
    if not (workdir / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{workdir} holds no metrics.jsonl: give the work directory (--workdir) of a run")
    records = jsonl.read_jsonl(workdir / "metrics.jsonl")
    # A resumed run may have written a step twice: the last one counts.
    steps = {record["step"]: record for record in records if record.get("type") == "step"}
    steps = [steps[step] for step in sorted(steps)]
    evaluations = [record for record in records if record.get("type") == "evaluation"]
    rollouts = jsonl.read_jsonl(workdir / "rollouts.jsonl") if (workdir / "rollouts.jsonl").is_file() else []
    summary, config, versions = (_read_json(workdir / f"{name}.json") for name in ("summary", "config", "versions"))
    stages = charts.stages_of(steps)
    curves, window = charts.curves(steps, stages) if steps else ([], 0)
    sampled, prompts_each = _rollouts(rollouts, workdir)
    files = {"Configuration": config, "Versions": versions, "Summary": summary}
    page = render(
        "run.html",
        title=f"{workdir.name}: run report",
        name=workdir.name,
        status=str(summary.get("status") or "no summary yet"),
        stages=stages,
        facts=_facts(steps, summary),
        alarms=[
            {"step": record["step"], "stage": record.get("stage"), "name": name, "text": told}
            for record in steps
            for name, told in (record.get("alarms") or {}).items()
        ],
        accuracy=_accuracy(evaluations, summary, config.get("evaluation") or {}),
        steps=len(steps),
        curves=curves,
        window=window,
        kinds=_kinds(evaluations),
        told=_read_json(workdir / "evaluation/final/counterfactual.json").get("shown") or {},
        rollouts=sampled,
        prompts_each=prompts_each,
        files={name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in files.items() if content},
    )
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; repair or delete it") from None
    return value if isinstance(value, dict) else {}


def _facts(steps: Sequence[Record], summary: Record) -> dict[str, str]:
    """What the tiles say; those without a value are left out."""
    seconds = [record["seconds"] for record in steps if is_number(record.get("seconds"))]
    median = summary.get("step_seconds_median", statistics.median(seconds) if seconds else None)
    return {
        "steps": f"{len(steps):,}",
        "wall time": duration(summary.get("seconds")),
        "median step": number(median, ".3g", " s"),
        "parameters": number(summary.get("parameters"), ",.0f"),
        "compilations after warm-up": number(summary.get("compilations_after_warmup"), ",.0f"),
        "log-prob difference, nats": number(summary.get("logprob_difference_mean"), ".1e"),
        "final format reward": number(summary.get("format_reward_final"), ".3f"),
        "skipped": counted(summary.get("skipped")),
        "put right": counted(summary.get("put_right")),
    }


def _accuracy(evaluations: Sequence[Record], summary: Record, drawn: Record) -> dict[str, Any]:
    """Table, chart and note of held-out accuracy; empty where there is none. `drawn`: config.evaluation."""
    accuracy = summary.get("accuracy") or metrics.accuracy_of(evaluations)
    if not accuracy:
        return {}
    moments, blind = moments_of(accuracy), summary.get("blind") or {}
    changed = set(moments) != {"base"}
    answered, left_out = (
        summary.get(key) or metrics.accuracy_of(evaluations, key) for key in ("accuracy_answered", "left_out")
    )
    rows = [
        _accuracy_row(name, values, moments, blind.get(name), answered.get(name) or {}, left_out.get(name) or {})
        for name, values in accuracy.items()
    ]
    note = f"{_how(drawn)} to held-out questions. {_asked(drawn)}"
    if changed:
        note += "Small figures and change: points against the base. Bold: best."
    if blind:
        note += " Blind: guessing from the training texts, without the image."
    if any(count for counts in left_out.values() for count in counts.values()):
        note += " Questions that were left out (too long, a broken image) count as wrong; in brackets: without them."
    if len(accuracy) > 1:
        values = {moment: [found.get(moment) for found in accuracy.values()] for moment in moments}
        mean = {moment: statistics.fmean(v) if all(map(is_number, v)) else None for moment, v in values.items()}
        rows.append(_accuracy_row("mean", mean, moments, None, {}, {}))
    errors = [record["standard_error"] for record in evaluations if is_number(record.get("standard_error"))]
    if errors:
        note += (
            f" The standard error of one figure is at most {100 * max(errors):.1f} points; questions about the same "
            "image count as one."
        )
    without_final = {moment: title for moment, title in moments.items() if moment != "final"}
    return {
        "head": ["capability", *moments.values(), *(["change"] if changed else []), *(["blind"] if blind else [])],
        "rows": rows,
        "changed": changed,
        "blind": bool(blind),
        "chart": charts.accuracy_chart(accuracy, without_final or moments),
        "note": note,
    }


def _how(drawn: Record) -> str:
    """How answers were drawn, by config.evaluation."""
    temperature = drawn.get("temperature")
    if not is_number(temperature):
        return "Answers"
    if not temperature:
        return "Greedy answers"
    top_p = drawn.get("top_p", 1)
    return f"Answers sampled at temperature {temperature:g}" + (f" and top-p {top_p:g}" if top_p < 1 else "")


_PLACES = {"suffix": "the instruction after the question", "system": "the instruction as a system turn"}


def _asked(settings: Record) -> str:
    """Where the instruction stood, by config.evaluation; "" of a config that does not say it."""
    if "instruction" not in settings:
        return ""
    base, trained = (_PLACES.get(settings.get(key), "no instruction") for key in ("base_instruction", "instruction"))
    if base == trained:
        return f"Asked with {trained}. "
    return f"The base was asked with {base}, trained models with {trained}: changes have that in them, too. "


def _accuracy_row(
    name: str, values: Record, moments: Mapping[str, str], blind: Any, answered: Record, left_out: Record
) -> dict[str, Any]:
    best = max((value for value in values.values() if is_number(value)), default=None)
    cells = [
        {
            "value": values.get(moment),
            "best": is_number(values.get(moment)) and values.get(moment) == best,
            "answered": answered.get(moment),
            "left_out": left_out.get(moment),
            "between": moment not in ("base", "final"),  # the last column has the end's difference
        }
        for moment in moments
    ]
    return {"name": name, "cells": cells, "base": values.get("base"), "final": values.get("final"), "blind": blind}


def _kinds(evaluations: Sequence[Record]) -> dict[str, Any]:
    """Accuracy of each kind of question at each moment; empty where there is none."""
    moments: dict[str, str] = {}
    kinds: dict[tuple[str, str], dict[str, float]] = {}
    for record in evaluations:
        for kind, value in (record.get("by_kind") or {}).items():
            moments[metrics.moment_of(record)] = moment_title(metrics.moment_of(record))
            kinds.setdefault((str(record["capability"]), str(kind)), {})[metrics.moment_of(record)] = value
    rows = [
        {"capability": capability, "kind": kind, "shares": [found.get(moment) for moment in moments]}
        | {"base": found.get("base"), "last": found.get(list(moments)[-1])}
        for (capability, kind), found in sorted(kinds.items())  # by capability, then kind
    ]
    changed = set(moments) != {"base"}
    head = ["capability", "kind", *moments.values(), *(["change"] if changed else [])]
    return {"head": head, "rows": rows, "changed": changed} if rows else {}


def _rollouts(rollouts: Sequence[Record], workdir: pathlib.Path) -> tuple[dict[str, dict[str, list]], int]:
    """Stage -> "Early" | "Late" -> prompts with their responses, and how many prompts at most."""
    by_stage: dict[str, dict[Any, Record]] = {}
    for record in rollouts:  # a resumed run may have written one twice: the last one counts
        by_stage.setdefault(str(record.get("stage", "")), {})[record.get("step", 0), str(record.get("id"))] = record
    each = min(3, max(1, MAX_PROMPTS // (2 * len(by_stage) or 1)))
    chosen = {}
    for stage, found in by_stage.items():
        records = sorted(found.values(), key=lambda record: record.get("step", 0))
        periods = {"Early": records[:each], "Late": records[max(each, len(records) - each) :]}
        chosen[stage] = {when: [_prompt(record, workdir) for record in some] for when, some in periods.items()}
    return chosen, each


def _prompt(record: Record, workdir: pathlib.Path) -> dict[str, Any]:
    paths, samples = [workdir / str(path) for path in record.get("images") or []], record.get("samples") or []
    return {
        **{key: record.get(key) for key in ("step", "id", "problem", "answer")},
        "pictures": [_picture(path) for path in paths[: pictures.MOST]],
        "more_pictures": len(paths) - pictures.MOST,
        "samples": samples[:MAX_RESPONSES],
        "more_samples": len(samples) - MAX_RESPONSES,
    }


def _picture(path: pathlib.Path) -> pictures.Picture:
    name = "/".join(path.parts[-2:])  # not the whole path: reports are passed on
    if not path.is_file():
        return pictures.Picture(trouble=f"image missing: {name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path) as image:
                width, height = image.size
                image.draft("RGB", (2 * pictures.SIDE, 2 * pictures.SIDE))  # a large JPEG is decoded small
                image = image.convert("RGBA" if image.mode in ("RGBA", "LA", "PA") else "RGB")
    except Exception as error:  # PIL's decoders raise a dozen kinds; the report says which
        return pictures.Picture(trouble=f"image unreadable: {name} ({type(error).__name__})")
    return pictures.embedded(image, f"{name}, {width} x {height} pixels")
