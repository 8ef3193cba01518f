"""Train, validation and test by the hash of the images, so that no image lies in two of them (paper: 85 / 5 / 10)."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from capcur_jax.curation.checking import Rows
from capcur_jax.curation.fingerprints import Images, spelling
from capcur_jax.data.problem import SPLITS, Drop, Problem, stable_hash
from capcur_jax.data.rows import read_rows, write_rows
from capcur_jax.errors import InputError

PAPER_SHARES = (85.0, 5.0, 10.0)


def split_file(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    shares: Sequence[float] = PAPER_SHARES,
    salt: str = "",
    images: str | os.PathLike | None = None,
    examples: int = 5,
    along: Callable[[Iterator], Iterator] = iter,
) -> dict[str, Any]:
    """Writes `directory`/train, validation and test: Parquet where `source` is, else JSON lines.

    Args:
      source: a file of rows.
      shares: of the images, for train, validation and test, in any unit.
      salt: another salt gives other splits.
      images: folder for the images of a Parquet file that holds them as bytes (`read_rows`).

    Returns:
      `rows`, `kept`, `dropped` (rows that can't be read or whose images can't) and, by split, `splits` and `files`.

    Raises:
      InputError: the shares or the file can't be used.
    """
    source, directory = Path(source), Path(directory)
    suffix = ".parquet" if source.suffix.lower() == ".parquet" else ".jsonl"
    files = {split: directory / f"{split}{suffix}" for split in SPLITS}
    if source.resolve() in {file.resolve() for file in files.values()}:
        raise InputError(f"--output {directory}: the splits would overwrite {source}; name another folder")
    if directory.is_file():
        raise InputError(f"--output {directory}: a file; name a folder for train{suffix}, validation and test")
    tally, reader = Rows(examples), Images()

    def rows() -> Iterator[Problem | Drop]:
        read = along(read_rows(source, images=images))
        for row, found in reader.along(read, lambda row: row.images if isinstance(row, Problem) else ()):
            if isinstance(row, Drop):
                yield row
                continue
            broken = [image for image in found if isinstance(image, str)]
            if broken:
                yield Drop(f"{source}, id {row.id[:60]}", "broken image", broken[0])
                continue
            problems.append(row)
            keys.append(image_keys(row, [image.pixels.hex() for image in found]))
            yield row

    problems: list[Problem] = []
    keys: list[list[str]] = []
    collections.deque(tally.kept(rows()), maxlen=0)
    splits = assign(keys, shares, salt)
    counts = collections.Counter(splits)
    for split, file in files.items():
        write_rows(file, (row for row, its in zip(problems, splits, strict=True) if its == split))
    return {
        **tally.summary(),
        "splits": {split: counts[split] for split in SPLITS},
        "images": {
            split: len(
                {
                    key
                    for its, row in zip(splits, keys, strict=True)
                    if its == split
                    for key in row
                    if key.startswith("pixels ")
                }
            )
            for split in SPLITS
        },
        "files": {split: str(file) for split, file in files.items()},
    }


def image_keys(problem: Problem, digests: Iterable[str]) -> list[str]:
    """What a row may not share with rows of another split; the first key is the one that is hashed.

    metadata["image_id"] where there is one, then the digests of its images' pixels; for a row with neither its text.
    """
    named = problem.metadata.get("image_id")
    keys = [f"id {named}"] if isinstance(named, str | int) and not isinstance(named, bool) and named != "" else []
    keys += [f"pixels {digest}" for digest in digests]
    return keys or [f"text {spelling(problem.problem)}"]


def assign(keys: Sequence[Sequence[str]], shares: Sequence[float] = PAPER_SHARES, salt: str = "") -> list[str]:
    """The split of each row, from `image_keys` of each. The order of the rows changes nothing.

    Rows that share a key go to the same split, and so do rows that are linked through others. What decides is the hash
    of one key of those linked rows - the smallest of their first keys - so a row whose images no other row has goes
    where it goes in any other file.

    Raises:
      InputError: the shares are not three numbers from 0 on, or all are 0.
    """
    if len(shares) != len(SPLITS) or not all(0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
        raise InputError(
            f"--shares {list(shares)}: give three numbers from 0 on, for {', '.join(SPLITS)}; e.g. 85 5 10"
        )
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row in keys:
        for key in row[1:]:
            parent[root(key)] = root(row[0])
    decides: dict[str, str] = {}
    for row in keys:
        group = root(row[0])
        decides[group] = min(row[0], decides.get(group, row[0]))
    return [_split_of(decides[root(row[0])], shares, salt) for row in keys]


def _split_of(key: str, shares: Sequence[float], salt: str) -> str:
    place = stable_hash("split", salt, key) / 2**64 * sum(shares)
    for split, share in zip(SPLITS, shares, strict=True):
        if place < share:
            return split
        place -= share
    return max(zip(shares, SPLITS, strict=True))[1]  # the sum's rounding
