"""GSM8K: word problems of primary school with worked solutions.

From: github.com/openai/grade-school-math, grade_school_math/data/{train,test}.jsonl (Hugging Face openai/gsm8k,
main/{train,test}-*.parquet). Licence: MIT. A row has `question` and `answer`, a solution whose last line is
"#### 1,234". The Socratic version asks the same and isn't read.

The number behind the last #### is the answer, without the commas of thousands. Ids are the file and the row's number,
metadata `split`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from capcur_jax.data.problem import BadRow, Drop, Problem
from capcur_jax.data.sources import published
from capcur_jax.data.sources.published import Record

FOLDERS = ("", "main/", "data/", "grade_school_math/data/")
PATTERNS = tuple(f"{folder}{split}" for split in ("train*.jsonl", "test*.jsonl") for folder in FOLDERS) + tuple(
    f"{folder}{split}" for split in ("train-*.parquet", "test-*.parquet") for folder in FOLDERS
)
ORIGIN = "https://github.com/openai/grade-school-math (grade_school_math/data/train.jsonl, test.jsonl)"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of train*.jsonl and test*.jsonl, or their Parquet. Raises InputError."""
    files = [file for file in published.find(directory, PATTERNS, ORIGIN) if "socratic" not in file.name]
    yield from published.problems(published.all_records(files), _convert)


def _convert(record: Record) -> Problem:
    _, mark, answer = published.text(record.value, "answer").rpartition("####")
    answer = _THOUSANDS.sub("", answer.strip())
    if not mark or not answer:
        raise BadRow("no final answer", "`answer` has no line `#### number`")
    return published.question(
        "gsm8k",
        f"{record.file.stem}-{record.number}",
        published.text(record.value, "question"),
        answer,
        capability="text",
        metadata={"split": re.split(r"[-_]", record.file.stem)[0]},
    )
