"""`report.html` of a run: one file, without scripts and network, that opens in any browser.

    python -m capcur_jax.report WORKDIR

makes it again from the records in WORKDIR: metrics.jsonl, and rollouts.jsonl, summary.json, config.json and
versions.json where they are there. Model output is untrusted: all text is escaped, invisible characters are made
visible, and a content security policy forbids scripts and loads from anywhere.
"""

import base64
import io
import json
import math
import pathlib
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import PIL.Image

from capcur_jax.records import jsonl, metrics
from capcur_jax.report import charts
from capcur_jax.report.page import PAGE, STYLE, duration, is_number, number, points, table, text

MAX_PROMPTS = 18  # sampled prompts shown, over all stages
MAX_RESPONSES = 8  # of one prompt
MAX_IMAGES = 4  # of one prompt
MAX_IMAGE_SIDE = 320  # pixels; larger images are scaled down

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
    body = [
        _header(workdir.name, steps, stages, summary),
        _accuracy_section(evaluations, summary),
        _curves_section(steps, stages),
        _kinds_section(evaluations),
        _rollouts_section(rollouts, workdir),
        _details_section({"Configuration": config, "Versions": versions, "Summary": summary}),
    ]
    footer = "Made by <code>python -m capcur_jax.report WORKDIR</code> from the records of the run."
    page = PAGE.format(title=text(f"{workdir.name}: run report"), style=STYLE, body="\n".join(body), footer=footer)
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _moment_title(moment: str) -> str:
    return moment.replace("after_", "after ", 1)


def _ordered_moments(accuracy: Mapping[str, Record]) -> dict[str, str]:
    """Moment -> its title: the base first, the end last, stages in their order between them."""
    moments = dict.fromkeys(moment for values in accuracy.values() for moment in values)
    order = sorted(moments, key=lambda moment: (moment == "final") - (moment == "base"))
    return {moment: _moment_title(moment) for moment in order}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}; repair or delete it") from None
    return value if isinstance(value, dict) else {}


def _header(name: str, steps: Sequence[Record], stages: Sequence[charts.Stage], summary: Record) -> str:
    status = str(summary.get("status") or "no summary yet")
    skipped = ", ".join(f"{count:,} {what}" for what, count in (summary.get("skipped") or {}).items() if count)
    seconds = [record["seconds"] for record in steps if is_number(record.get("seconds"))]
    median = summary.get("step_seconds_median", statistics.median(seconds) if seconds else None)
    compilations = summary.get("compilations_after_warmup")
    facts = {
        "steps": f"{len(steps):,}",
        "wall time": duration(summary.get("seconds")),
        "median step": number(median, ".3g", " s"),
        "parameters": number(summary.get("parameters"), ",.0f"),
        "compilations after warm-up": number(compilations, ",.0f"),
        "log-prob difference, nats": number(summary.get("logprob_difference_mean"), ".1e"),
        "final format reward": number(summary.get("format_reward_final"), ".3f"),
        "skipped": skipped,
    }
    tiles = "".join(f"<div><b>{text(value)}</b>{text(key)}</div>" for key, value in facts.items() if value)
    order = " &rarr; ".join(f"{text(stage.name)} <small>{stage.first}-{stage.last}</small>" for stage in stages)
    color = "good" if status == "finished" else "bad"
    return (
        f'<h1>{text(name)} <span class="chip {color}">{text(status)}</span></h1>'
        f'<p class="stages">{order or "no step yet"}</p><div class="tiles">{tiles}</div>'
    )


def _accuracy_section(evaluations: Sequence[Record], summary: Record) -> str:
    accuracy = summary.get("accuracy") or metrics.accuracy_of(evaluations)
    if not accuracy:
        return "<h2>Held-out accuracy</h2><p>No evaluation is recorded.</p>"
    moments, blind = _ordered_moments(accuracy), summary.get("blind") or {}
    rows = {name: [text(name), *_accuracy_cells(values, moments)] for name, values in accuracy.items()}
    head = ["capability", *moments.values(), "change"]
    note = "Greedy answers to held-out questions. Small figures and change: points against the base. Bold: best."
    if blind:
        head.append("blind")
        rows = {name: [*row, number(blind.get(name), ".1%")] for name, row in rows.items()}
        note += " Blind: guessing without the image."
    if len(accuracy) > 1:
        values = {moment: [found.get(moment) for found in accuracy.values()] for moment in moments}
        mean = {moment: statistics.fmean(v) if all(map(is_number, v)) else None for moment, v in values.items()}
        rows["", "mean"] = ["mean", *_accuracy_cells(mean, moments), *([""] if blind else [])]
    counts = [record["questions"] for record in evaluations if is_number(record.get("questions"))]
    if counts and min(counts) > 0:
        error = f"{50 / math.sqrt(min(counts)):.1f}"
        note += f" With {min(counts):,} questions the standard error of one figure is at most {error} points."
    without_final = {moment: title for moment, title in moments.items() if moment != "final"}
    chart = f"<figure>{charts.accuracy_chart(accuracy, without_final or moments)}</figure>"
    lead = f'<div class="lead">{table(head, [*rows.values()], "headline")}{chart}</div>'
    return f'<h2>Held-out accuracy</h2>{lead}<p class="note">{note}</p>'


def _accuracy_cells(values: Record, moments: Iterable[str]) -> list[str]:
    """HTML cells of one capability; the last is the difference of the end and the base."""
    base = values.get("base")
    best = max((value for value in values.values() if is_number(value)), default=None)
    cells = []
    for moment in moments:
        value = values.get(moment)
        cell = number(value, ".1%") or "-"
        cell = f"<b>{cell}</b>" if is_number(value) and value == best else cell
        cells.append(cell + (f" <small>{points(value, base)}</small>" if moment not in ("base", "final") else ""))
    return [*cells, points(values.get("final"), base)]


def _kinds_section(evaluations: Sequence[Record]) -> str:
    """Accuracy of each kind of question at each moment."""
    moments: dict[str, str] = {}
    kinds: dict[tuple[str, str], dict[str, float]] = {}
    for record in evaluations:
        for kind, value in (record.get("by_kind") or {}).items():
            moments[metrics.moment_of(record)] = _moment_title(metrics.moment_of(record))
            kinds.setdefault((str(record["capability"]), str(kind)), {})[metrics.moment_of(record)] = value
    if not kinds:
        return ""
    rows, last = [], list(moments)[-1]
    for capability, kind in sorted(kinds):  # by capability, then kind
        values = kinds[capability, kind]
        cells = [number(values.get(moment), ".1%") or "-" for moment in moments]
        rows.append([text(capability), text(kind), *cells, points(values.get(last), values.get("base"))])
    rendered = table(["capability", "kind", *moments.values(), "change"], rows)
    return f'<h2>Accuracy by kind of question</h2><div class="scroll">{rendered}</div>'


def _curves_section(steps: Sequence[Record], stages: Sequence[charts.Stage]) -> str:
    if not steps:
        return "<h2>Training</h2><p>No step is recorded yet.</p>"
    drawn, window = charts.curves(steps, stages)
    note = f"Faint: single steps. Line: mean over {window} steps of the same stage, without values beyond the axis."
    figures = "".join(f"<figure>{chart}</figure>" for chart in drawn)
    return f'<h2>Training</h2><p class="note">{note}</p><div class="charts">{figures}</div>'


def _rollouts_section(rollouts: Sequence[Record], workdir: pathlib.Path) -> str:
    if not rollouts:
        return ""
    by_stage: dict[str, dict[Any, Record]] = {}
    for record in rollouts:  # a resumed run may have written one twice: the last one counts
        by_stage.setdefault(str(record.get("stage", "")), {})[record.get("step", 0), str(record.get("id"))] = record
    each = min(3, max(1, MAX_PROMPTS // (2 * len(by_stage))))
    parts = []
    for stage, found in by_stage.items():
        records = sorted(found.values(), key=lambda record: record.get("step", 0))
        early, late = records[:each], records[max(each, len(records) - each) :]
        parts.append(f"<h3>{text(stage)}</h3>")
        for when, chosen in (("Early", early), ("Late", late)):
            if chosen:
                cards = "".join(_rollout_card(record, workdir) for record in chosen)
                parts.append(
                    f'<details class="period" open><summary>{when} in {text(stage)}</summary>{cards}</details>'
                )
    note = (
        f"The first and the last {each} recorded prompts of each stage, not picked by result. "
        "Color: advantage in the group (green above its mean, red below, gray: all rewards equal)."
    )
    return f'<h2>Sampled responses</h2><p class="note">{note}</p>{"".join(parts)}'


def _rollout_card(record: Record, workdir: pathlib.Path) -> str:
    paths = [workdir / str(path) for path in record.get("images") or []]
    images = "".join(_image(path) for path in paths[:MAX_IMAGES])
    if len(paths) > MAX_IMAGES:
        images += f'<p class="note">{len(paths) - MAX_IMAGES} more images</p>'
    samples = record.get("samples") or []
    responses = "".join(_response(sample) for sample in samples[:MAX_RESPONSES])
    if len(samples) > MAX_RESPONSES:
        responses += f'<p class="note">{len(samples) - MAX_RESPONSES} more responses</p>'
    return (
        f'<article><div class="prompt"><p class="note">step {text(record.get("step"))} &middot; '
        f"{text(record.get('id'))}</p>{images}<pre>{text(record.get('problem'))}</pre>"
        f'<p>gold answer: <code>{text(record.get("answer"))}</code></p></div><div class="responses">{responses}</div>'
        "</article>"
    )


def _response(sample: Record) -> str:
    advantage = sample.get("advantage")
    color = "even" if not is_number(advantage) or advantage == 0 else "good" if advantage > 0 else "bad"
    meta = [f"<b>reward {number(sample.get('reward'), '.2f') or '-'}</b>"]
    meta.append(f"advantage {number(advantage, '+.2f' if advantage else '.2f') or '-'}")
    meta += [f"{key} {number(sample[key], '.3g') or '-'}" for key in ("accuracy", "format") if key in sample]
    meta += [f"{text(sample['tokens'])} tokens"] if "tokens" in sample else []
    finish = sample.get("finish")
    meta += [f"<em>{'cut at the limit' if finish == 'length' else text(finish)}</em>"] if finish else []
    return (
        f'<div class="response {color}"><p>{" &middot; ".join(meta)}</p><pre>{text(sample.get("response"))}</pre></div>'
    )


def _image(path: pathlib.Path) -> str:
    """An <img> with the picture inside, or a line that says why there is none."""
    name = text("/".join(path.parts[-2:]))  # not the whole path: reports are passed on
    if not path.is_file():
        return f'<p class="missing">image missing: {name}</p>'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path) as image:
                width, height = image.size
                image.draft("RGB", (2 * MAX_IMAGE_SIDE, 2 * MAX_IMAGE_SIDE))  # a large JPEG is decoded small
                image = image.convert("RGBA" if image.mode in ("RGBA", "LA", "PA") else "RGB")
    except Exception as error:  # PIL's decoders raise a dozen kinds; the report says which
        return f'<p class="missing">image unreadable: {name} ({text(type(error).__name__)})</p>'
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    photo = image.mode == "RGB" and max(image.size) > 128
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if photo else "PNG", **({"quality": 80} if photo else {"optimize": True}))
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "jpeg" if photo else "png"
    enlarge = max(1, 160 // max(image.size))  # whole times, so that small pictures stay sharp
    title = f"{name}, {width} x {height} pixels"
    shape = f'width="{image.width * enlarge}"' + (' class="enlarged"' if enlarge > 1 else "")
    return f'<img {shape} src="data:image/{kind};base64,{data}" alt="{title}" title="{title}">'


def _details_section(contents: Mapping[str, Record]) -> str:
    parts = []
    for title, content in contents.items():
        if content:
            dump = text(json.dumps(content, indent=2, ensure_ascii=False), limit=None)
            parts.append(f"<details><summary>{title}</summary><pre>{dump}</pre></details>")
    return "<h2>How it was made</h2>" + "".join(parts) if parts else ""
