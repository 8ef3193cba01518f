"""PixMo-Cap: 717,042 web images with captions that a language model wrote from what people said about them.

From: Hugging Face allenai/pixmo-cap, data/train-*.parquet. Licence: ODC-BY 1.0 for the texts; the images belong to
their owners. Columns: `image_url`, `caption`, `transcripts` (what was said; not read).

The set names its images by URL alone, and a share of them is gone. Save each as
images/<SHA-256 of the URL's UTF-8 bytes, in hex>.<jpg, jpeg, png, webp, gif, or no suffix>; rows without a file are
dropped. Copies of the set that have the bytes in a column `image` are read too.

Each row becomes a caption row: a request for a description, the caption as `response`, metadata `image_id` (that
SHA-256), `image_url` and `split`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from capcur_jax.data.problem import BadRow, Drop, Problem, short
from capcur_jax.data.sources import published
from capcur_jax.data.sources.published import Record

PATTERNS = ("train-*.parquet", "data/train-*.parquet")
ORIGIN = "https://huggingface.co/datasets/allenai/pixmo-cap (data/train-*.parquet)"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", "")


def image_name(url: str) -> str:
    """The name, less its suffix, of the file that holds an URL's image."""
    return hashlib.sha256(url.encode()).hexdigest()


def read(directory: Path, images: Path) -> Iterator[Problem | Drop]:
    """The rows of train-*.parquet; image bytes are unpacked below `images`. Raises InputError."""

    def convert(record: Record) -> Problem:
        row = record.value
        url, words = published.text(row, "image_url"), published.text(row, "caption")
        image_id = image_name(url)
        if row.get("image") is not None:
            path = published.embedded_image(row["image"], images)
        else:
            try:
                names = [f"images/{image_id}{suffix}" for suffix in SUFFIXES]
                path = published.image_file(directory, record, *names)
            except BadRow:
                detail = (
                    f"no images/{image_id[:12]}….jpg for {short(url, 60)}; docs/data_sources.md says how to save them"
                )
                raise BadRow("missing image", detail) from None
        return published.caption(
            "pixmo_cap", image_id, path, words, {"image_url": url, "split": "train"}, row_id=image_id[:16]
        )

    files = published.find(directory, PATTERNS, ORIGIN)
    yield from published.problems(published.all_records(files), convert)
