"""Data cards as pages: one HTML file with its pictures inside; nothing is loaded from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capcur_jax.curation.card import Card
from capcur_jax.data.images import load_image
from capcur_jax.data.problem import Problem
from capcur_jax.errors import InputError
from capcur_jax.files import write_atomically
from capcur_jax.models.inputs import BadImage
from capcur_jax.report import pictures
from capcur_jax.report.charts import bar_chart
from capcur_jax.report.page import render

_METADATA = 800  # characters


def card_file(output: str) -> Path:
    """The file that `--output` means: a folder gets card.html.

    Raises:
      InputError: another name.
    """
    path = Path(output)
    if not path.suffix or path.is_dir():
        return path / "card.html"
    if path.suffix != ".html":
        raise InputError(f"--output {output}: a card is an HTML page; give a folder, or a name that ends in .html")
    return path


def write_card(card: Card, file: Path) -> None:
    """Writes the page. Raises InputError where that can't be done."""
    try:
        write_atomically(file, html_page(card).encode())
    except OSError as error:
        raise InputError(f"--output {file}: can't be written ({error.strerror}); name another place") from None


def html_page(card: Card) -> str:
    """The page's text."""
    sections = []
    for section in card.sections:
        rows = [[(_figure(cell), cell) for cell in row] for row in section.rows]
        chart = bar_chart(section.heading, section.unit, section.bars, section.head[0]) if section.bars else ""
        sections.append((section, rows, chart))
    return render(
        "card.html", title=card.title, card=card, sections=sections, examples=[_example(row) for row in card.examples]
    )


def picture(path: str) -> pictures.Picture:
    """The upright image."""
    name = "/".join(Path(path).parts[-2:])  # not the whole path: cards are passed on
    try:
        image = load_image(path)
    except BadImage:
        return pictures.Picture(trouble=f"{name}: missing or unreadable")
    return pictures.embedded(image, f"{name}, {image.width} x {image.height} pixels")


def _figure(cell: Any) -> str:
    """A cell that is a number, "" for text."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return cell if isinstance(cell, str) and re.fullmatch(r"[\d.]+%", cell) else ""


def _example(problem: Problem) -> dict[str, Any]:
    metadata = json.dumps(dict(problem.metadata), ensure_ascii=False, indent=1) if problem.metadata else ""
    return {
        "problem": problem,
        "pictures": [picture(path) for path in problem.images[: pictures.MOST]],
        "more_pictures": len(problem.images) - pictures.MOST,
        "facts": _facts(problem),
        "metadata": metadata if len(metadata) <= _METADATA else metadata[: _METADATA - 1] + "…",
    }


def _facts(problem: Problem) -> Sequence[tuple[str, str]]:
    """What is said below an example."""
    rate = "" if problem.pass_rate is None else f"{problem.pass_rate:.3f}"
    facts = {
        "answer": problem.answer,
        "answer type": problem.answer_type,
        "capability": problem.capability,
        "kind": problem.kind,
        "source": problem.source,
        "pass rate": rate,
        "predictions": ", ".join(prediction[:40] or "(none)" for prediction in problem.predictions[:8]),
    }
    return [(key, value) for key, value in facts.items() if value]
