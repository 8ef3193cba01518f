"""DOCCI: 15,000 photographs with long descriptions by people, for caption SFT and for perception questions.

From: google.github.io/docci (Hugging Face google/docci): docci_descriptions.jsonlines and docci_images.tar.gz, which
unpacks to images/. Licence: CC BY 4.0, texts and images. A line has `example_id` ("train_00000"), `split` (train, test,
qual_dev, qual_test), `image_file` ("train_00000.jpg") and `description`; others aren't read.

Also read: the 100 rows of DOCCI's test split in google/imageinwords (DOCCI_Test/data.jsonl, CC BY 4.0; `image` is the
example id and `DOCCI` the description), for the same images.

Each row becomes a caption row: a request for a description, the description as `response`, metadata `image_id` (the
example id) and `split`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from capcur_jax.data.problem import Drop, Problem
from capcur_jax.data.sources import published
from capcur_jax.data.sources.published import Record

PATTERNS = ("docci_descriptions.jsonlines", "*docci*.jsonl", "DOCCI_Test/data.jsonl")
ORIGIN = "https://google.github.io/docci (docci_descriptions.jsonlines; docci_images.tar.gz, unpacked to images/)"


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of docci_descriptions.jsonlines in `directory`; `images` stays unused. Raises InputError."""

    def convert(record: Record) -> Problem:
        row = record.value
        if "example_id" in row:
            image_id, split = published.text(row, "example_id"), published.text(row, "split")
            name, words = published.text(row, "image_file"), published.text(row, "description")
        else:
            image_id, words = published.text(row, "image"), published.text(row, "DOCCI")
            name, split = f"{image_id}.jpg", image_id.rpartition("_")[0]
        path = published.image_file(directory, record, f"images/{name}", name)
        return published.caption("docci", image_id, path, words, {"split": split})

    files = published.find(directory, PATTERNS, ORIGIN)
    yield from published.problems(published.all_records(files), convert)
