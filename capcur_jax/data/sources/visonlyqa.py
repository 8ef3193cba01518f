"""VisOnlyQA: what models see in figures: geometry, 3D scenes, charts and chemistry, as choices and true or false.

From: github.com/psunlpgroup/VisOnlyQA, dataset/{val,test}/{synthetic,synthetic_with_text,real}/<kind>.jsonl with
images/ beside or above; or Hugging Face ryokamoi/VisOnlyQA_{Train,Eval_Real_v1.1,Eval_Synthetic}, data/<kind>-*.parquet
with the image's bytes in `decoded_image`. Licence: GPL-3.0. A row has `id`, `image_path`, `prompt_no_reasoning` (with
options "(a) 45 degrees (b) ..." and a last paragraph that forbids reasoning), `question` (mostly null), `answer` ("a",
"True"), `response_options`, `question_type`, `image_category`, `task_category` and `source`.

The prompt without its last paragraph is the problem. Options become lines "A. ..." and the answer its capital letter;
true and false stay words. Rows with several right options (chemistry's shape_multi) are dropped. The files
text_<kind>.jsonl ask the same questions and describe the figure in words first: the description goes to metadata
`caption`, the problem is the question alone, so that a row has all that the perception filter wants. `kind` is the
file's name, metadata `image_id`, `subject` (the image's category) and `origin` (where the image comes from).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from capcur_jax.data.problem import BadRow, Drop, Problem
from capcur_jax.data.sources import published, wording
from capcur_jax.data.sources.published import Record

PATTERNS = tuple(f"{folder}*__*.{suffix}" for suffix in ("jsonl", "parquet") for folder in ("", "*/", "*/*/", "*/*/*/"))
ORIGIN = "https://github.com/psunlpgroup/VisOnlyQA (the folder dataset) or https://huggingface.co/ryokamoi"
_INSTRUCTION = re.compile(r"\s*Your response should only include the final answer[^\n]*\s*$")
_AFTER_TEXT = "Using the figure and above information, answer the following questions."
_OPTION = re.compile(r"\(([a-z])\)\s")


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of <kind>.jsonl and <kind>-*.parquet, three folders deep. Raises InputError."""

    def convert(record: Record) -> Problem:
        row = record.value
        row_id, name = published.text(row, "id"), published.text(row, "image_path")
        if published.optional_text(row, "question_type") == "multiple_answers":
            raise BadRow("several answers", "the question has any number of right options")
        if row.get("decoded_image") is not None:
            path = published.embedded_image(row["decoded_image"], images)
        else:
            path = published.image_file(directory, record, name)
        prompt = _INSTRUCTION.sub("", published.text(row, "prompt_no_reasoning"))
        described, _, asked = prompt.rpartition(_AFTER_TEXT)
        problem, options = _split_options(asked.strip(), published.texts(row, "response_options"))
        answer = published.text(row, "answer")
        return published.question(
            "visonlyqa",
            row_id,
            problem,
            answer.upper() if len(answer) == 1 else answer,
            capability="perception",
            images=[path],
            options=options,
            kind=re.split(r"-\d", record.file.stem)[0],
            metadata={
                "image_id": PurePosixPath(name).stem,
                "subject": published.optional_text(row, "image_category"),
                "origin": published.optional_text(row, "source"),
                "caption": described.strip(),
            },
        )

    files = published.find(directory, PATTERNS, ORIGIN)
    yield from published.problems(published.all_records(files), convert)


def _split_options(asked: str, letters: list[str]) -> tuple[str, list[str]]:
    """Splits "... (a) 5 (b) 6" where its letters are the row's own; else the letters are labels in the figure."""
    if not letters or letters != list(wording.LETTERS[: len(letters)].lower()):
        return asked, []
    if _OPTION.findall(asked) != letters:
        return asked, letters
    head, *parts = _OPTION.split(asked)
    return head.strip(), [part.strip() for part in parts[1::2]]
