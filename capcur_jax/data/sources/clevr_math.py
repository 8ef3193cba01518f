"""CLEVR-Math: additions and subtractions about rendered scenes of blocks, balls and cylinders.

From: Hugging Face dali-does/clevr-math: data/clevr-math.zip (and clevr-math-multihop.zip, the same questions in another
split), which unpack to clevr-math-train.json, clevr-math-val.json and clevr-math-test.json; the images are CLEVR's
(CLEVR_v1.0.zip, unpacked to CLEVR_v1.0/images/{train,val}) and data/clevr-math-test-images.zip. Licence: CC BY 4.0. A
file is an object whose list `questions` has `image_filename`, `split`, `question`, `answer` (a whole number),
`template_filename` (addition, subtraction, adversarial, subtraction-multihop) and `question_index`; others, such as the
program, aren't read.

Ids are the image and the question's index. `kind` is the template, metadata `image_id` and `split`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from capcur_jax.data.problem import Drop, Problem
from capcur_jax.data.sources import published
from capcur_jax.data.sources.published import Record

SPLITS = ("train", "val", "test")
PATTERNS = tuple(f"{folder}clevr-math-{split}.json" for split in SPLITS for folder in ("", "*/"))
ORIGIN = (
    "https://huggingface.co/datasets/dali-does/clevr-math (data/clevr-math.zip; images: data/clevr-math-test-images.zip"
    " and CLEVR_v1.0.zip)"
)


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of clevr-math-*.json, in `directory` or a folder in it. Raises InputError."""

    def convert(record: Record) -> Problem:
        row = record.value
        name, split = published.text(row, "image_filename"), published.text(row, "split")
        image_id = PurePosixPath(name).stem
        places = (f"CLEVR_v1.0/images/{split}/{name}", f"images/{split}/{name}", f"images/{name}", name)
        index = published.optional_text(row, "question_index") or f"row-{record.number}"
        return published.question(
            "clevr_math",
            f"{image_id}-{index}",
            published.text(row, "question"),
            published.text(row, "answer"),
            capability="visual",
            images=[published.image_file(directory, record, *places)],
            kind=published.optional_text(row, "template_filename").removesuffix(".json"),
            metadata={"image_id": image_id, "split": split},
        )

    files = published.find(directory, PATTERNS, ORIGIN)
    yield from published.problems(published.all_records(files, "questions"), convert)
