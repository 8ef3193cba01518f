"""Data cards as pages: one HTML file with everything inside, or Markdown with a folder of pictures."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from capcur_jax.curation.card import Card, Section
from capcur_jax.data.images import load_image
from capcur_jax.data.problem import Problem
from capcur_jax.errors import InputError
from capcur_jax.files import write_atomically
from capcur_jax.models.inputs import BadImage
from capcur_jax.report.charts import bar_chart
from capcur_jax.report.page import MAX_CHARACTERS, PAGE, STYLE, table, text, visible

SIDE = 320  # pixels of the longer side of a picture
MAX_IMAGES = 4  # of one example
FOOTER = "Made by <code>python -m capcur_jax.data card</code> from the rows of the files."
_METADATA = 800  # characters
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|&~#!])")
_STYLE = """
.counts th,.counts td{text-align:left}.counts td{white-space:normal;overflow-wrap:anywhere;vertical-align:top}
.number{display:block;text-align:right;white-space:nowrap}.facts p{margin:.15rem 0}.prompt .note{overflow-wrap:anywhere}
"""


class Picture(NamedTuple):
    """A small picture of an image file, or what is wrong with it."""

    data: bytes
    kind: str  # "jpeg" | "png"; "": it can't be read
    width: int
    height: int
    title: str


def write_card(card: Card, output: Path) -> Path:
    """Writes `output` (.html, .md, or a folder, which gets card.html) and returns its path.

    Raises:
      InputError: another name, or a folder that can't be written.
    """
    if not output.suffix or output.is_dir():
        output = output / "card.html"
    if output.suffix not in (".html", ".md"):
        raise InputError(f"--output {output}: give a folder, or a name that ends in .html or .md")
    try:
        write_atomically(output, (html_page(card) if output.suffix == ".html" else _markdown(card, output)).encode())
    except OSError as error:
        raise InputError(f"--output {output}: can't be written ({error.strerror}); name another place") from None
    return output


def picture(path: str) -> Picture:
    """The upright image, at most SIDE pixels long; JPEG where it is large enough to be a photo."""
    name = "/".join(Path(path).parts[-2:])  # not the whole path: cards are passed on
    try:
        image = load_image(path)
    except BadImage:
        return Picture(b"", "", 0, 0, f"{name}: missing or unreadable")
    title = f"{name}, {image.width} x {image.height} pixels"
    if max(image.size) > SIDE:  # never without pixels, however narrow
        scale = SIDE / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    kind, options = ("JPEG", {"quality": 80}) if max(image.size) > 128 else ("PNG", {"optimize": True})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Picture(buffer.getvalue(), kind.lower(), *image.size, title)


# ---------------------------------------------------------------------- HTML


def html_page(card: Card) -> str:
    """One file without scripts; nothing is loaded from anywhere."""
    tiles = "".join(f"<div><b>{text(value)}</b>{text(key)}</div>" for key, value in card.facts.items())
    body = [f'<h1>{text(card.title)}</h1><div class="tiles">{tiles}</div>', *map(_html_section, card.sections)]
    if card.examples:
        body.append("<h2>Examples</h2>")
        body.append('<p class="note">Of every kind in turn, chosen by the hash of their ids.</p>')
        body += map(_html_example, card.examples)
    return PAGE.format(title=text(card.title), style=STYLE + _STYLE, body="\n".join(body), footer=FOOTER)


def _html_section(section: Section) -> str:
    made = table(section.head, [[_html_cell(cell) for cell in row] for row in section.rows], "counts")
    if section.bars:
        chart = bar_chart(section.heading, section.unit, section.bars, section.head[0])
        made = f'<div class="lead">{made}<figure>{chart}</figure></div>'
    note = f'<p class="note">{text(section.note)}</p>' if section.note else ""
    return f"<h2>{text(section.heading)}</h2>{note}{made}"


def _html_cell(cell: Any) -> str:
    number = f"{cell:,}" if _whole(cell) else str(cell) if re.fullmatch(r"[\d.]+%", str(cell)) else ""
    return f'<span class="number">{number}</span>' if number else text(cell, 500)


def _html_example(problem: Problem) -> str:
    images = ""
    for found in map(picture, problem.images[:MAX_IMAGES]):
        if not found.kind:
            images += f'<p class="missing">{text(found.title)}</p>'
            continue
        enlarge = max(1, 160 // max(found.width, found.height))  # whole times, so that small pictures stay sharp
        shape = f'width="{found.width * enlarge}"' + (' class="enlarged"' if enlarge > 1 else "")
        data = base64.b64encode(found.data).decode()
        title = text(found.title)
        images += f'<img {shape} src="data:image/{found.kind};base64,{data}" alt="{title}" title="{title}">'
    if len(problem.images) > MAX_IMAGES:
        images += f'<p class="note">{len(problem.images) - MAX_IMAGES} more images</p>'
    facts = "".join(f"<p>{text(key)}: <code>{text(value, 500)}</code></p>" for key, value in _facts(problem))
    target = f"<p>response to learn</p><pre>{text(problem.response)}</pre>" if problem.response else ""
    more = _metadata(problem)
    details = f"<details><summary>metadata</summary><pre>{text(more)}</pre></details>" if more else ""
    return (
        f'<article><div class="prompt"><p class="note">{text(problem.id, 200)}</p>{images}</div>'
        f'<div class="responses"><div class="response even"><pre>{text(problem.problem)}</pre></div>{target}'
        f'<div class="facts">{facts}{details}</div></div></article>'
    )


# ---------------------------------------------------------------------- Markdown


def _markdown(card: Card, output: Path) -> str:
    """The page; pictures go into a folder beside it, named after it."""
    folder = output.with_name(f"{output.stem}-images")
    lines = [f"# {_inline(card.title)}", ""]
    lines += [f"- {_inline(key)}: **{_inline(value)}**" for key, value in card.facts.items()]
    for section in card.sections:
        lines += ["", f"## {_inline(section.heading)}", "", *([_inline(section.note), ""] if section.note else [])]
        lines.append("| " + " | ".join(map(_inline, section.head)) + " |")
        lines.append("|" + "---|" * len(section.head))
        lines += ["| " + " | ".join(map(_inline, row)) + " |" for row in section.rows]
    if card.examples:
        lines += ["", "## Examples", "", "Of every kind in turn, chosen by the hash of their ids."]
    for number, problem in enumerate(card.examples, start=1):
        lines += ["", f"### {number}. {_inline(problem.id)}", "", *_block(problem.problem)]
        lines += [f"- {_inline(key)}: {_inline(value)}" for key, value in _facts(problem)]
        if problem.response:
            lines += ["", "Response to learn:", "", *_block(problem.response)]
        if _metadata(problem):
            lines += ["", "Metadata:", "", *_block(_metadata(problem))]
        lines += ["", *_markdown_pictures(problem, number, folder)]
    lines += ["", "Made by `python -m capcur_jax.data card` from the rows of the files.", ""]
    return "\n".join(lines)


def _markdown_pictures(problem: Problem, number: int, folder: Path) -> list[str]:
    lines = []
    for place, found in enumerate(map(picture, problem.images[:MAX_IMAGES]), start=1):
        if not found.kind:
            lines.append(_inline(found.title))
            continue
        file = folder / f"{number}-{place}.{found.kind}"
        write_atomically(file, found.data)
        # The folder is of the user's choosing; spaces and brackets would end the link.
        link = re.sub(r"[^\w./-]", lambda match: "".join(f"%{byte:02X}" for byte in os.fsencode(match[0])), folder.name)
        lines.append(f"![{_inline(found.title)}]({link}/{file.name})")
    if len(problem.images) > MAX_IMAGES:
        lines.append(f"{len(problem.images) - MAX_IMAGES} more images")
    return lines


def _inline(value: Any) -> str:
    """Text that no Markdown reader takes for marks, on one line."""
    shown = f"{value:,}" if _whole(value) else str(value)
    return _MARKDOWN.sub(r"\\\1", " ".join(visible(_cut(shown, 500)).split()))


def _block(value: str) -> list[str]:
    """Lines of an indented code block: nothing in them is read as Markdown, whatever it is."""
    lines = visible(_cut(value, MAX_CHARACTERS)).replace("\t", "    ").split("\n")
    return [*("    " + line for line in lines), ""]


# ---------------------------------------------------------------------- both


def _facts(problem: Problem) -> list[tuple[str, str]]:
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


def _metadata(problem: Problem) -> str:
    if not problem.metadata:
        return ""
    return _cut(json.dumps(dict(problem.metadata), ensure_ascii=False, indent=1), _METADATA)


def _cut(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - 1] + "…"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
