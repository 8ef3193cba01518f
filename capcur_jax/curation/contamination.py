"""What training rows share with evaluation rows: images, pictures that look alike, and questions.

A question alone says nothing where there are images: "How many objects are there?" is asked of thousands. So texts
count between two rows without images, and between rows whose images are the same or look alike.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capcur_jax.curation.checking import Rows
from capcur_jax.curation.fingerprints import (
    Fingerprint,
    Images,
    Looks,
    TextIndex,
    file_digest,
    jaccard,
    shingles,
    spelling,
)
from capcur_jax.data.problem import Drop, Problem
from capcur_jax.data.rows import read_rows, write_rows
from capcur_jax.models.inputs import BadImage

# The surest first.
KINDS = ("image and text", "image", "text", "similar text", "look and text", "look")
LOOKS = ("look and text", "look")  # pictures that look alike, which may be wrong: a set of drawings has many
PAIRS_OF_A_ROW = 5  # named for one training row; all are counted
_NEAR_KEPT = 20_000  # images whose look-alikes are remembered
_ROWS_OF_AN_IMAGE = 100  # of the evaluation rows with one image, those whose text is compared word for word


class Row(NamedTuple):
    """What is known of a row: its place, its text (a number of `Evaluation.texts`), its images (of `images`)."""

    file: str
    id: str
    text: int
    images: tuple[int, ...]


class Match(NamedTuple):
    """A training row and an evaluation row that share something."""

    kind: str  # one of KINDS
    row: Row  # of the evaluation
    text: float  # similarity of the texts, 0 to 1
    image: float | None  # how much the pictures differ; 0: the same pixels; None: no images compared


class Evaluation:
    """The evaluation rows, indexed by image, by looks and by text."""

    def __init__(self, threshold: float):
        self.rows: list[Row] = []
        self._threshold = threshold
        self._images: dict[bytes, int] = {}  # digest -> number
        self._texts: dict[str, int] = {}
        self._looks: list = []
        self._by_image: dict[int, list[int]] = {}  # -> row numbers
        self._by_text: dict[int, list[int]] = {}  # of rows without images
        self._shingles: list[np.ndarray] = []

    def add(self, file: str, problem: Problem, images: Sequence[Fingerprint | bytes]) -> None:
        """`images`: fingerprints, or the digest of the file of an image that can't be decoded."""
        text = spelling(problem.problem)
        if text not in self._texts:
            self._texts[text] = len(self._texts)
            self._shingles.append(shingles(text.split()))
        numbers = []
        for image in images:
            key = image if isinstance(image, bytes) else image.pixels
            if key not in self._images:
                self._images[key] = len(self._images)
                self._looks.append(None if isinstance(image, bytes) else image.look)
            numbers.append(self._images[key])
        row = Row(file, problem.id, self._texts[text], tuple(dict.fromkeys(numbers)))
        for number in row.images:
            self._by_image.setdefault(number, []).append(len(self.rows))
        if not problem.images:
            self._by_text.setdefault(row.text, []).append(len(self.rows))
        self.rows.append(row)

    def finish(self) -> None:
        """Builds the indexes; no `add` may follow."""
        self._nearest, self._near = Looks(self._looks), {}
        # Texts of rows without images, which may match by themselves.
        self._plain = np.array(list(self._by_text), np.int64)
        self._rows_of_plain = np.array([len(rows) for rows in self._by_text.values()], np.int64)
        self._plain_hit = np.zeros(len(self._plain), bool)
        self._index = TextIndex([self._shingles[text] for text in self._plain])
        self.hit_images: dict[int, bool] = {}  # number -> whether by its pixels, not by looks only

    def matches(self, problem: Problem, images: Sequence[Fingerprint | bytes]) -> tuple[list[Match], int, bool]:
        """What a training row shares.

        Returns:
          The surest matches, at most PAIRS_OF_A_ROW; how many there are; whether the text is also asked here, with
          nothing else in common.
        """
        text = spelling(problem.problem)
        number = self._texts.get(text)
        its_shingles = shingles(text.split())
        if not problem.images:
            found, total = self._text_matches(number, its_shingles)
        else:
            found, total = self._image_matches(images, number, its_shingles)
        found.sort(key=lambda match: (KINDS.index(match.kind), -match.text, match.image or 0.0))
        return found[:PAIRS_OF_A_ROW], total, number is not None and not any(match.text == 1.0 for match in found)

    def _text_matches(self, number: int | None, its_shingles: np.ndarray) -> tuple[list[Match], int]:
        places, scores = self._index.similar(its_shingles, self._threshold)
        others = self._plain[places] != number if number is not None else slice(None)
        places, scores = places[others], scores[others]
        if number in self._by_text:  # equal in whole, which texts of equal shingles need not be
            places = np.append(np.flatnonzero(self._plain == number), places)
            scores = np.append(1.0, scores)
        self._plain_hit[places] = True
        found: list[Match] = []
        for place, score in zip(places[:PAIRS_OF_A_ROW], scores, strict=False):
            text = int(self._plain[place])
            kind = "text" if text == number else "similar text"
            found += [Match(kind, self.rows[row], float(score), None) for row in self._by_text[text][:PAIRS_OF_A_ROW]]
        return found, int(self._rows_of_plain[places].sum())

    def _image_matches(self, images: Sequence, number: int | None, its_shingles: np.ndarray) -> tuple[list[Match], int]:
        near: dict[int, float | None] = {}  # image number -> difference; None: the same pixels
        for image in images:
            same = self._images.get(image if isinstance(image, bytes) else image.pixels)
            for other, difference in [] if isinstance(image, bytes) else self._looks_like(image):
                near.setdefault(other, difference)
            if same is not None:
                near[same] = None
        found: dict[int, Match] = {}
        counted = 0
        for image, difference in sorted(near.items(), key=lambda pair: -1.0 if pair[1] is None else pair[1]):
            self.hit_images[image] = difference is None or self.hit_images.get(image, False)
            rows = self._by_image[image]
            counted += len(rows)
            # Those with the very same text first; the others of a picture that has very many rows are only counted.
            for row in sorted(rows, key=lambda row: self.rows[row].text != number)[:_ROWS_OF_AN_IMAGE]:
                if row not in found:
                    found[row] = self._pair(row, number, its_shingles, difference)
        return list(found.values()), max(counted, len(found))

    def _looks_like(self, image: Fingerprint) -> list[tuple[int, float]]:
        """The evaluation's images that look like it; an image is often asked about several times."""
        if image.pixels not in self._near:
            if len(self._near) >= _NEAR_KEPT:
                self._near.clear()
            self._near[image.pixels] = self._nearest.near(image.look)
        return self._near[image.pixels]

    def _pair(self, row: int, number: int | None, its_shingles: np.ndarray, difference: float | None) -> Match:
        its = self.rows[row]
        score = 1.0 if its.text == number else jaccard(its_shingles, self._shingles[its.text])
        kind = ("image" if difference is None else "look") + (" and text" if score >= self._threshold else "")
        return Match(kind, its, score, difference or 0.0)

    def hit_rows(self, looks: bool = False) -> dict[str, int]:
        """By file, the evaluation rows that a training row shares something with; with `looks` also by looks alone."""
        hits = {row for image, exact in self.hit_images.items() if exact or looks for row in self._by_image[image]}
        hits |= {row for text in self._plain[self._plain_hit] for row in self._by_text[int(text)]}
        return dict(collections.Counter(self.rows[row].file for row in hits))


def compare(
    train: Sequence[str | os.PathLike],
    against: Sequence[str | os.PathLike],
    threshold: float = 0.8,
    images: str | os.PathLike | None = None,
    examples: int = 5,
    along: Callable[[Iterator, str], Iterator] = lambda items, _: items,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[tuple[str, str], str]]:
    """Compares training files with evaluation files, row by row.

    Args:
      train, against: JSONL or Parquet files. The evaluation's indexes are held in memory, training rows are not.
      threshold: texts of at least this Jaccard similarity of their 5-word runs are near-duplicates.

    Returns:
      The report; the named pairs; and (file, id) of each training row that shares something -> its surest kind.

    Raises:
      InputError: a file can't be read.
    """
    read, train_tally, against_tally = Images(look=True), Rows(examples), Rows(examples)
    unreadable: dict[str, str] = {}

    def rows(files: Sequence, tally: Rows, label: str) -> Iterator[tuple[str, Problem, list[Fingerprint | bytes]]]:
        problems = ((str(file), problem) for file in files for problem in tally.kept(read_rows(file, images=images)))
        for (file, problem), found in read.along(along(problems, label), lambda row: row[1].images):
            usable: list[Fingerprint | bytes] = []
            for path, image in zip(problem.images, found, strict=True):
                if isinstance(image, str):
                    unreadable.setdefault(path, image)
                    with contextlib.suppress(BadImage):  # equal files are equal images, whatever is in them
                        usable.append(file_digest(path))
                else:
                    usable.append(image)
            yield file, problem, usable

    evaluation = Evaluation(threshold)
    for file, problem, found in rows(against, against_tally, "evaluation rows"):
        evaluation.add(file, problem, found)
    evaluation.finish()
    kinds: dict[tuple[str, str], str] = {}
    pairs: list[dict[str, Any]] = []
    totals = collections.Counter()
    for file, problem, found in rows(train, train_tally, "training rows"):
        matches, total, same_text = evaluation.matches(problem, found)
        totals["pairs"] += total
        totals["same text, nothing else in common"] += same_text and not matches
        if matches:
            kinds[file, problem.id] = matches[0].kind
        pairs += [_pair(file, problem, match) for match in matches]
    rows_of_files = collections.Counter(row.file for row in evaluation.rows)
    surely, also = evaluation.hit_rows(), evaluation.hit_rows(looks=True)
    by_kind = collections.Counter(kinds.values())
    report = {
        "train": train_tally.summary(),
        "against": against_tally.summary(),
        "threshold": threshold,
        "training_rows": {kind: by_kind[kind] for kind in KINDS},
        "evaluation_rows": {
            file: {"rows": count, "shared": surely.get(file, 0), "shared_or_look": also.get(file, 0)}
            for file, count in ((str(file), rows_of_files[str(file)]) for file in against)
        },
        "pairs": totals["pairs"],
        "same_text_only": totals["same text, nothing else in common"],
        "unreadable_images": {"images": len(unreadable), "examples": list(unreadable.values())[:examples]},
    }
    return report, pairs, kinds


def write_clean(
    train: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    kinds: dict[tuple[str, str], str],
    looks: bool = False,
    images: str | os.PathLike | None = None,
    examples: int = 5,
) -> dict[str, Any]:
    """Writes the training rows that share nothing with the evaluation; those that look alike too, unless `looks`.

    Returns:
      `rows`, `kept` and `dropped` by reason, of the written file.
    """
    removed = {row: kind for row, kind in kinds.items() if looks or kind not in LOOKS}
    tally = Rows(examples)

    def rows() -> Iterator[Problem | Drop]:
        seen: set[str] = set()
        for file in map(str, train):
            for row in read_rows(file, images=images):
                if isinstance(row, Problem):
                    where = f"{file}, id {row.id[:60]}"
                    if (file, row.id) in removed:
                        yield Drop(where, f"contaminated: {removed[file, row.id]}", "an evaluation row has it too")
                        continue
                    if row.id in seen:
                        yield Drop(where, "id of another file", "give each row its own id, or clean one file at a time")
                        continue
                    seen.add(row.id)
                yield row

    written: Iterable[Problem] = tally.kept(rows())
    write_rows(Path(output), written)
    return tally.summary()


def _pair(file: str, problem: Problem, match: Match) -> dict[str, Any]:
    pair = {
        "kind": match.kind,
        "train": {"file": file, "id": problem.id},
        "against": {"file": match.row.file, "id": match.row.id},
        "text_similarity": round(match.text, 4),
    }
    return pair if match.image is None else {**pair, "image_difference": round(match.image, 3)}
