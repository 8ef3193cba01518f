"""MATH-Vision: competition problems with figures; test (3,040) and testmini (304 of them).

From: github.com/mathllm/MATH-V, data/{test,testmini}.jsonl and images/; or Hugging Face MathLLMs/MathVision,
data/{test,testmini}-*.parquet with the image's bytes in `decoded_image`. Licence: MIT. A row has `id`, `question` with
marks <image1>, <image2>, ..., `options` ([], texts, or letters that are labels in the figure), `image`
("images/4.jpg"), `answer` (a letter where there are options), `solution` (not read), `level` (1 to 5) and `subject`.

A row has one picture. Where its text has several marks, the picture has the parts one below the other and names them
"<image1>:", "<image2>:"; the picture then comes first and the text keeps the names, which are no marks of this project.
Ids are the published ones, `kind` is the subject, metadata `subject`, `level`, `split` and `image_id`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from capcur_jax.data.problem import IMAGE_MARK, Drop, Problem
from capcur_jax.data.sources import published
from capcur_jax.data.sources.published import Record

PATTERNS = tuple(
    f"{folder}{split}{ending}"
    for ending in (".jsonl", "-*.parquet")
    for split in ("testmini", "test")
    for folder in ("", "data/")
)
ORIGIN = (
    "https://github.com/mathllm/MATH-V (data/test.jsonl, images) or https://huggingface.co/datasets/MathLLMs/MathVision"
)
_PART = re.compile(r"<image\d+>")


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of testmini and test, JSON lines or Parquet; a problem of both comes once. Raises InputError."""

    def convert(record: Record) -> Problem:
        row = record.value
        name, subject = published.text(row, "image"), published.optional_text(row, "subject")
        if row.get("decoded_image") is not None:
            path = published.embedded_image(row["decoded_image"], images)
        else:
            path = published.image_file(directory, record, name)
        problem, options = published.text(row, "question"), published.texts(row, "options")
        if len(_PART.findall("\n".join((problem, *options)))) > 1:
            problem = f"{IMAGE_MARK}\n{problem}"
        level = row.get("level")
        return published.question(
            "mathvision",
            published.text(row, "id"),
            problem,
            published.text(row, "answer"),
            capability="visual",
            images=[path],
            options=options,
            kind=subject,
            metadata={
                "image_id": PurePosixPath(name).stem,
                "subject": subject,
                "level": level if isinstance(level, int) else None,
                "split": re.split(r"[-_]", record.file.stem)[0],
            },
        )

    files = published.find(directory, PATTERNS, ORIGIN)
    yield from published.problems(published.all_records(files), convert)
