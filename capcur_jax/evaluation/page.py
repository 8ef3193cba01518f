"""`report.html` of an evaluation: scores with all that they depend on, and wrong answers to look at.

One file without scripts and network, in the style of a run's report. Filters are the page's own form elements and
style sheets. Everything that it shows is untrusted text, and escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from capcur_jax.data.image_files import FORMATS
from capcur_jax.data.problem import stable_hash
from capcur_jax.evaluation import counterfactual, errors, folders
from capcur_jax.evaluation.benchmarks.base import MODES
from capcur_jax.evaluation.folders import Answered, Folder
from capcur_jax.files import write_atomically
from capcur_jax.records.text import is_number, number
from capcur_jax.report import pictures
from capcur_jax.report.page import render

FILE = "report.html"
MOST = 500  # wrong answers on the page
SIDE = 224  # pixels of a picture's longer side
PICTURES = 8 << 20  # bytes of all pictures together
_SHARES = ("cut, %", "undecided, %", "nothing read, %")
_FACTS = ("category", "kind", "subject", "level", "split", "type", "source")  # of a row, beside its answer
_KINDS = {  # of an error, where no judge named one
    "no reply": lambda one, verdict: bool(one.reply.failed),
    "cut off": lambda one, verdict: one.reply.finish == "length",
    "undecided": lambda one, verdict: verdict.by == "none",
    "nothing read": lambda one, verdict: verdict.read is None,
    "other answer": lambda one, verdict: True,
}


class _Wrong(NamedTuple):
    benchmark: str
    one: Answered
    error: Mapping[str, Any] | None

    def kind(self, mode: str) -> str:
        if self.error:
            return str(self.error["first"]).replace("_", " ")
        verdict = self.one.verdicts[mode]
        return next(name for name, applies in _KINDS.items() if applies(self.one, verdict))


def write(workdir: Path, mode: str = MODES[0]) -> Path:
    """Writes WORKDIR/report.html from scores.json, predictions/, and errors.json and counterfactual.json if there.

    Args:
      mode: whose rules say what is wrong.

    Raises:
      InputError: there is no evaluation in the folder.
    """
    file = workdir / FILE
    write_atomically(file, html(folders.read(workdir), mode).encode())
    return file


def html(folder: Folder, mode: str) -> str:
    """The page's text."""
    parts = folder.path.resolve().parts
    name = f"{parts[-3]}, {parts[-1]}" if parts[-2:-1] == ("evaluation",) else folder.name  # of a run
    judged, told = _json(folder.path / errors.FILE), _json(folder.path / counterfactual.FILE)
    shown, of = _drawn(folder, judged, mode)
    room = Room(PICTURES)
    articles = [_article(wrong, mode, room) for wrong in shown]
    filters = {
        key: sorted({article[key] for article in articles if article[key]}) for key in ("benchmark", "category", "kind")
    }
    numbers = {key: {value: at for at, value in enumerate(values, 1)} for key, values in filters.items()}
    return render(
        "evaluation.html",
        title=f"{name}: evaluation",
        name=name,
        head=["benchmark", "rows", *(f"{which}, %" for which in MODES), *_SHARES, "tokens"],
        scores=[_score(folder, each) for each in folder.answered],
        classes={each: list(_classes(folder, each)) for each in folder.answered},
        conditions={each: folders.conditions(folder, each) for each in folder.answered},
        errors=_errors(judged),
        told=counterfactual.shown(told) if told else {},
        articles=articles,
        filters=filters,
        numbers=numbers,
        mode=mode,
        of=of,
        without_picture=room.refused,
    )  # fmt: skip


# ---------------------------------------------------------------------- tables


def _score(folder: Folder, name: str) -> list[Any]:
    own = (folder.scores.get("benchmarks") or {}).get(name) or {}
    replies = own.get("replies") or {}
    share = (own.get(MODES[0]) or {}).get("share") or {}
    return [
        name,
        number(own.get("rows", len(folder.answered[name])), ",.0f"),
        *(_with_interval(own.get(mode) or {}) for mode in MODES),
        number(_percent(replies.get("cut")), ".1f") or "-",
        number(_percent(share.get("undecided")), ".1f") or "-",
        number(_percent(share.get("unreadable")), ".1f") or "-",
        number(replies.get("tokens"), ".0f") or "-",
    ]


def _with_interval(numbers: Mapping[str, Any]) -> tuple[str, str]:
    """(the main number, its interval)"""
    interval = numbers.get("interval")
    limits = "" if not interval else f"{interval[0]:.1f} to {interval[1]:.1f}"
    return number(numbers.get("score"), ".1f") or "-", limits


def _classes(folder: Folder, name: str) -> Iterator[tuple[str, list[str]]]:
    """(class, its figure in both modes) of a benchmark's further numbers."""
    own = (folder.scores.get("benchmarks") or {}).get(name) or {}
    found = [_flat(own.get(mode) or {}) for mode in MODES]
    for key in dict.fromkeys(key for one in found for key in one):
        yield key, [number(one.get(key), ".4g") or "-" for one in found]


def _flat(numbers: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in numbers.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{key}: ")
        elif is_number(value) and (before or key not in ("score", "rows")):
            flat[f"{before}{key}"] = value
    return flat


def _errors(judged: Mapping[str, Any]) -> dict[str, Any]:
    if not judged:
        return {}
    whole = judged["all"]
    rows = []
    for name, definition in judged["definition"].items():
        cells = []
        for which in ("first", "anywhere"):
            share = whole[which][name]["share"]
            cells.append(
                ("-", "") if not share else (f"{100 * share[0]:.1f}", f"{100 * share[1]:.1f} to {100 * share[2]:.1f}")
            )
        rows.append((name.replace("_", " "), *cells, definition))
    return {"rows": rows, "judge": judged["judge"], "all": whole, "paper": judged["paper"], "show": judged["show"]}


# ---------------------------------------------------------------------- wrong answers


def _drawn(folder: Folder, judged: Mapping[str, Any], mode: str) -> tuple[list[_Wrong], int]:
    """At most MOST wrong answers, as many of each benchmark, those that a judge has seen first; and of how many."""
    found = []
    for name, answered in folder.answered.items():
        seen = (judged.get("rows") or {}).get(name) or {}
        wrong = [
            _Wrong(name, one, seen.get(one.row.index))
            for one in answered.values()
            if mode in one.verdicts and one.verdicts[mode].credit < 1
        ]
        found.append(sorted(wrong, key=lambda one: (one.error is None, stable_hash("page", one.one.row.index))))
    turns = [one[at] for at in range(max(map(len, found), default=0)) for one in found if at < len(one)]
    places = {name: at for at, name in enumerate(folder.answered)}
    shown = sorted(turns[:MOST], key=lambda one: places[one.benchmark])
    return shown, len(turns)


def _article(wrong: _Wrong, mode: str, room: Room) -> dict[str, Any]:
    one, verdict = wrong.one, wrong.one.verdicts[mode]
    row, reply, error = one.row, one.reply, wrong.error or {}
    other = [f"{name}: {one.verdicts[name].credit:g}" for name in MODES if name != mode and name in one.verdicts]
    by = {"none": "no rule and no judge could decide"}.get(verdict.by, f"by {verdict.by}")
    return {
        "benchmark": wrong.benchmark,
        "category": one.category,
        "kind": wrong.kind(mode),
        "index": row.index,
        "facts": [f"{key} {row.facts[key]}" for key in _FACTS if row.facts.get(key) not in (None, "")],
        "question": row.question,
        "options": [f"{letter}. {text}" for letter, text in row.options.items()],
        "gold": " or ".join(row.gold),
        "read": verdict.read,
        "credit": verdict.credit,
        "by": by,
        "other": ", ".join(other),
        "response": reply.failed or reply.text,
        "tokens": reply.tokens,
        "cut": reply.finish == "length",
        "quote": error.get("quote") or "",
        "quoted": bool(error.get("quoted")),
        "present": ", ".join(error.get("present") or ()).replace("_", " "),
        "confidence": error.get("confidence") or "",
        "pictures": [room.picture(path) for path in row.images[: pictures.MOST]],
        "more_pictures": len(row.images) - pictures.MOST,
    }


class Room:
    """Makes small pictures until `limit` bytes are taken; `refused` counts those that had no place."""

    def __init__(self, limit: int):
        self._left, self.refused = limit, 0

    def picture(self, path: Path) -> pictures.Picture:
        name = "/".join(path.parts[-2:])  # not the whole path: pages are passed on
        if self._left <= 0:
            self.refused += 1
            return pictures.Picture(trouble=f"{name}: no room on this page")
        try:
            with Image.open(path, formats=FORMATS) as image:
                size = image.size
                image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a large JPEG is decoded small
                image = image.convert("RGBA" if image.mode in ("RGBA", "LA", "PA") else "RGB")
        except Exception as error:  # broken files make Pillow raise a dozen kinds
            return pictures.Picture(trouble=f"{name}: {type(error).__name__}")
        made = pictures.embedded(image, f"{name}, {size[0]} x {size[1]} pixels", SIDE)
        self._left -= len(made.source)
        return made


def _percent(share: Any) -> float | None:
    return 100 * share if is_number(share) else None


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
