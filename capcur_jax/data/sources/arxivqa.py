"""ArxivQA: multiple-choice questions about figures of arXiv papers, written by GPT-4V.

From: Hugging Face MMInstruction/ArxivQA: arxivqa.jsonl and images.tgz, unpacked to images/. Licence: CC BY-SA 4.0. A
line has `id` ("cond-mat-2782"), `image` ("images/1501.00713_2.jpg"), `question`, `options` (most with their letter:
"A) 3", some without), `label` (a letter, some with the option's text or only that) and `rationale` (not read).

The letter is the answer; rows whose label is none of the options, or whose right option is there twice, are dropped.
Ids are the published ones, metadata `subject` (the id's archive) and `image_id` (the figure's file).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from capcur_jax.data.problem import BadRow, Drop, Problem
from capcur_jax.data.sources import published
from capcur_jax.data.sources.published import Record

PATTERNS = ("arxivqa.jsonl",)
ORIGIN = "https://huggingface.co/datasets/MMInstruction/ArxivQA (arxivqa.jsonl; images.tgz, unpacked to images/)"


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of arxivqa.jsonl in `directory`. Raises InputError."""

    def convert(record: Record) -> Problem:
        row = record.value
        row_id, name, options = published.text(row, "id"), published.text(row, "image"), published.texts(row, "options")
        if not options:
            raise BadRow("bad options", "`options` is missing or empty")
        return published.question(
            "arxivqa",
            row_id,
            published.text(row, "question"),
            published.text(row, "label"),
            capability="visual",
            images=[published.image_file(directory, record, name, f"images/{name}")],
            options=options,
            kind="choice",
            metadata={"subject": row_id.rpartition("-")[0], "image_id": PurePosixPath(name).stem},
        )

    files = published.find(directory, PATTERNS, ORIGIN)
    yield from published.problems(published.all_records(files), convert)
