"""DocVQA (single page): questions about scanned pages of the UCSF industry documents, answered by words of the page.

From: rrc.cvc.uab.es/?ch=17 (registration): spdocvqa_qas/{train,val}_v1.0_withQT.json and spdocvqa_images.tar.gz,
unpacked to spdocvqa_images/ (older releases: documents/); or Hugging Face lmms-lab/DocVQA,
DocVQA/{train,validation}-*.parquet. Licence: MIT for the annotations as the challenge's hosts on Hugging Face state it
(lmms-lab: Apache-2.0); the pages are public records. The JSON is an object whose list `data` has `questionId`,
`question`, `question_types` (from withQT on), `image` ("documents/xnbl0037_1.png"), `docId`, `ucsf_document_id`,
`ucsf_document_page_no`, `answers` and `data_split`; the Parquet has the same columns, `image` with its bytes. The test
split has no answers, so its rows are dropped.

All accepted answers count. Ids are `questionId`, `kind` the first of the question types, metadata `question_types`,
`split` and `image_id` (document and page).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from capcur_jax.data.problem import BadRow, Drop, Problem
from capcur_jax.data.sources import published
from capcur_jax.data.sources.published import Record

SPLITS = ("train", "val", "validation", "test")
PATTERNS = tuple(f"{folder}{split}_v1.0*.json" for split in SPLITS for folder in ("", "*/")) + tuple(
    f"{folder}{split}-*.parquet" for split in SPLITS for folder in ("", "DocVQA/")
)
ORIGIN = (
    "https://rrc.cvc.uab.es/?ch=17 (train_v1.0_withQT.json, images) or https://huggingface.co/datasets/lmms-lab/DocVQA"
)


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of SPLIT_v1.0*.json and SPLIT-*.parquet; image bytes are unpacked below `images`. Raises InputError."""

    def convert(record: Record) -> Problem:
        row = record.value
        answers = [answer.strip() for answer in published.texts(row, "answers") if answer.strip()]
        if not answers:
            raise BadRow("no answer", "`answers` is empty, as it is in the test split")
        types = published.texts(row, "question_types")
        if isinstance(row.get("image"), str):
            name = published.text(row, "image")
            image_id = PurePosixPath(name).stem
            places = (name, f"spdocvqa_images/{PurePosixPath(name).name}", f"images/{PurePosixPath(name).name}")
            path = published.image_file(directory, record, *places)
        else:
            image_id = f"{published.text(row, 'ucsf_document_id')}_{published.text(row, 'ucsf_document_page_no')}"
            path = published.embedded_image(row.get("image"), images)
        return published.question(
            "docvqa",
            published.text(row, "questionId"),
            published.text(row, "question"),
            *answers,
            capability="visual",
            images=[path],
            kind=types[0] if types else "",
            metadata={
                "question_types": types,
                "split": published.optional_text(row, "data_split"),
                "image_id": image_id,
            },
        )

    files = published.find(directory, PATTERNS, ORIGIN)
    yield from published.problems(published.all_records(files, "data"), convert)
