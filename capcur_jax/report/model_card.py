"""The page of an export, README.md beside its weights: where the model comes from, what it learned, what it scores.

The lines between the first two `---` are the Hugging Face Hub's, for search and filters. Files of this machine are told
by their names alone: the page may become public.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capcur_jax.files import write_atomically
from capcur_jax.records import jsonl, metrics
from capcur_jax.records.text import is_number, moments_of, visible

NAME = "README.md"
_UNKNOWN = "unknown"
_LICENCE = ("license", "license_name", "license_link")  # the Hub's keys

Record = Mapping[str, Any]


def write(workdir: Path, source: Path, base: str) -> list[Path]:
    """Writes the card of each export in `workdir`/checkpoints from the run's records.

    Args:
      source: the directory of the checkpoint that the run began with; its card tells the licence.
      base: that checkpoint as the Hub has it, OWNER/NAME@COMMIT; "": it is of this machine.
    """
    read = {name: _read(workdir / f"{name}.json") for name in ("config", "summary", "versions", "questions")}
    records = jsonl.read_jsonl(workdir / "metrics.jsonl")
    licence, written = licence_of(source / NAME), []
    for export in sorted(workdir.glob("checkpoints/*/config.json")):
        text = _card(workdir, export.parent.name, read, records, licence, base)
        written.append(export.with_name(NAME))
        write_atomically(written[-1], text.encode())
    return written


def licence_of(card: Path) -> dict[str, str]:
    """What a card says of its model's licence, under the Hub's keys; empty where there is no card, or it says none."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        told = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, or one whose head can't be read
        return {}
    return {key: str(told[key]) for key in _LICENCE if told.get(key)}


def _card(
    workdir: Path,
    name: str,
    read: Mapping[str, Record],
    records: Sequence[Record],
    licence: Mapping[str, str],
    base: str,
) -> str:
    from huggingface_hub import ModelCardData

    config, summary = read["config"], read["summary"]
    position, _, stage = name.partition("-")
    done = list(summary.get("stages") or [])
    if stage and position.isdecimal():
        done = done[: int(position)]
    names = [row["stage"] for row in done]
    hub, origin = base.partition("@")[0], _origin(config, base)
    head = ModelCardData(
        **{"license": _UNKNOWN, **licence},
        base_model=hub or None,
        datasets=_datasets(config) or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["capcur_jax", *sorted({row["objective"] for row in done})],
    )
    what = {"final": "at the end of the run", "best": "where its validation was best"}
    moment = what.get(name, f"after the stage {stage}")
    lines = [
        f"---\n{head.to_yaml()}\n---",
        f"# {_cell(workdir.name)}: {_cell(name)}",
        f"A vision-language model that capcur_jax {_commit(read['versions'])}trained from {origin}, {moment}. "
        f"The run is {summary.get('status', _UNKNOWN)}, its seed {config['seed']}.",
        *(["## Stages", _table(list(done[0]), (row.values() for row in done))] if done else []),
    ]
    learned = [row for one in names if (row := _learned(one, records))]
    if learned:
        lines += [
            "Means over the first and the last tenth of each stage's steps:",
            _table(("stage", "steps", "reward", "accuracy", "response length", "loss"), learned),
        ]
    lines += ["## Data", _table(("set", "split", "from", "questions"), _data(config, read["questions"]))]
    lines += _scores(name, read, records, names)
    told = ", ".join(licence.values())
    lines += [
        "## Licence",
        f"The base's own: {_cell(told)}." if told else "Unknown: the base came without a card that says it.",
        "The data have licences of their own.",
    ]
    return "\n\n".join(lines) + "\n"


def _origin(config: Record, base: str) -> str:
    if base:
        return f"[{base}](https://huggingface.co/{base.replace('@', '/tree/')})"
    return f"the checkpoint `{Path(config['checkpoint']).name}`" if config["checkpoint"] else "random weights"


def _commit(versions: Record) -> str:
    return f"(commit {versions['commit'][:10]}) " if versions.get("commit") else ""


def _datasets(config: Record) -> list[str]:
    """Those of the Hub: OWNER/NAME."""
    files = (str(entry[split]) for entry in config["data"]["sets"].values() for split in ("train", "test"))
    names = ("/".join(file.split("/")[3:5]).partition("@")[0] for file in files if file.startswith("hf://datasets/"))
    return sorted(set(names))


def _learned(stage: str, records: Iterable[Record]) -> tuple[Any, ...]:
    steps = [record for record in records if record.get("type") == "step" and record.get("stage") == stage]
    if not steps:
        return ()
    tenth = max(1, len(steps) // 10)

    def ends(key: str, form: str) -> str:
        values = [[r[key] for r in part if is_number(r.get(key))] for part in (steps[:tenth], steps[-tenth:])]
        return " to ".join(f"{statistics.fmean(part):{form}}" for part in values if part)

    forms = {"reward": ".3f", "accuracy": ".1%", "response_length": ".0f", "loss": ".3g"}
    return stage, len(steps), *(ends(key, form) for key, form in forms.items())


def _data(config: Record, questions: Record) -> Iterable[tuple[Any, ...]]:
    """Held-out sets, and what the stages train on."""
    trained = dict.fromkeys(name for stage in config["order"] for name in config["stages"][stage]["data"])
    split = config["evaluation"]["split"]
    asked = (questions.get("evaluation") or {}).get("sets") or {}
    for name in trained:
        yield name, "train", _from(config["data"]["sets"][name], "train"), ""
    for name in config["evaluation"]["sets"]:
        found = asked.get(name) or {}
        count = f"{found['questions']:,} of {found['of']:,}" if found else ""
        yield name, split, _from(config["data"]["sets"][name], split), count


def _from(entry: Record, split: str) -> str:
    file = entry[split]
    if file:
        return file if file.startswith("hf://") else Path(file).name
    return f"built: {entry['source']}"


def _scores(name: str, read: Mapping[str, Record], records: Iterable[Record], done: Sequence[str]) -> list[str]:
    """Held-out accuracy of the base and of this export, and how the questions were asked."""
    config, settings = read["config"], read["config"]["evaluation"]
    accuracy = metrics.accuracy_of(record for record in records if record.get("type") == "evaluation")
    wanted = {"base", *(f"after_{stage}" for stage in done)} if name != "best" else {"base"}
    rows = [
        (title, *(_share(values.get(moment)) for values in accuracy.values()))
        for moment, title in moments_of(accuracy).items()
        if moment in wanted
    ]
    best = read["summary"].get("best_validation")
    lines = ["## Scores", _table(("held-out accuracy", *accuracy), rows)] if rows else []
    if name == "best" and is_number(best):
        lines = [*(lines or ["## Scores"]), f"On the validation questions it was chosen by: {best:.1%} in the mean."]
    if not lines:
        return ["## Scores", "None: it was not evaluated."]
    drawn = f"temperature {settings['temperature']:g}, top_p {settings['top_p']:g}"
    how = drawn if settings["temperature"] else "greedy"
    placed = read["summary"].get("instruction") or {}
    left = read["summary"].get("left_out") or {}
    missing = sum(count or 0 for moments in left.values() for moment, count in moments.items() if moment in wanted)
    said = [
        f"{how}, at most {config['rollout']['max_new_tokens']} tokens",
        *(f"instruction {where} ({purpose})" for purpose, where in placed.items()),
        f"reward {config['reward']['function'] or 'built in'}",
        *([f"{missing:,} answers are missing and count as wrong"] if missing else []),
    ]
    return [*lines, f"Conditions: split {settings['split']}; {'; '.join(said)}."]


def _share(value: float | None) -> str:
    return f"{value:.1%}" if is_number(value) else "-"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    rows = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows)


def _cell(value: Any) -> str:
    """One line that ends no cell and is no HTML."""
    text = visible(" ".join(str(value).split()))
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
