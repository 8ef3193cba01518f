"""What makes two rows the same: digests of images' pixels, what an image looks like, and texts in one spelling."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from capcur_jax.data.image_files import flaw
from capcur_jax.data.images import load_image
from capcur_jax.data.problem import IMAGE_MARK
from capcur_jax.models.inputs import BadImage

LOOK_SIDE = 16
# Images look alike where up to MAX_BITS of 64 bits differ, and small pictures differ by at most this share of how much
# they vary. Found on drawings and photos that were halved, saved as JPEG, brightened and cropped (docs/data_checks.md).
MAX_BITS = 12
MAX_DIFFERENCE = 0.35

_DIGEST_BYTES = 16
_FLAT = 1.0  # standard deviation, of 255: a small picture that varies less holds nothing to compare
# Letters of scripts without spaces are words of their own; signs that change a formula's meaning are kept.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+|[-+*/=<>^%]")
_SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/"})
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


class Look(NamedTuple):
    """What an image looks like, small enough to keep for every image."""

    bits: int  # 64: whether brightness rises from left to right, in 8 x 8 places (dHash)
    small: bytes  # 16 x 16 RGB


class Fingerprint(NamedTuple):
    """An image file. `pixels` are equal for equal upright RGB pixels, whatever format and EXIF the files have."""

    pixels: bytes  # 16 bytes
    height: int
    width: int
    look: Look | None = None  # None: not asked for, or the picture is flat
    flaw: str = ""  # what is wrong with a file that could be read all the same


def fingerprint(path: str, look: bool = False) -> Fingerprint:
    """Decodes an image whole. Raises BadImage, naming the file and the remedy."""
    _check_file(path)
    image = load_image(path)
    digest = hashlib.blake2b(b"%d %d " % image.size, digest_size=_DIGEST_BYTES)
    digest.update(image.tobytes())
    return Fingerprint(digest.digest(), image.height, image.width, _look(image) if look else None, flaw(image))


def file_digest(path: str) -> bytes:
    """16 bytes that are equal for equal files, decodable or not. Raises BadImage where the file can't be read."""
    _check_file(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).digest()
    except OSError as error:
        raise BadImage(f"{path}: not readable ({error.strerror}); put it there or take the row out") from None


def _check_file(path: str) -> None:
    if not os.path.isfile(path):  # a pipe would be waited for, for ever
        raise BadImage(f"{path}: no such image; put it there or take the row out")


def _look(image: Image.Image) -> Look | None:
    small = image.resize((LOOK_SIDE, LOOK_SIDE), Image.Resampling.BOX)
    if np.linalg.norm(_centered(small.tobytes())) < _FLAT * (3 * LOOK_SIDE**2) ** 0.5:
        return None
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    rises = np.packbits(gray[:, 1:] > gray[:, :-1])
    return Look(int.from_bytes(rises.tobytes(), "big"), small.tobytes())


def _centered(small: bytes) -> np.ndarray:
    """A small picture as numbers around its mean color: brightness alone is no difference."""
    values = np.frombuffer(small, np.uint8).astype(np.float32).reshape(-1, 3)
    return values - values.mean(axis=0)


class Looks:
    """Finds the images that look like another one: few bits differ, and then the small pictures do hardly."""

    def __init__(self, looks: Sequence[Look | None]):
        self._index = np.array([i for i, look in enumerate(looks) if look], np.int64)
        self._bits = np.array([look.bits for look in looks if look], np.uint64)
        small = b"".join(look.small for look in looks if look)
        self._small = np.frombuffer(small, np.uint8).reshape(len(self._bits), 3 * LOOK_SIDE**2)
        self._norms = np.array([np.linalg.norm(_centered(look.small)) for look in looks if look])

    def near(self, look: Look | None) -> list[tuple[int, float]]:
        """(index into the looks given, difference of the small pictures), the nearest first."""
        if look is None or not len(self._bits):
            return []
        candidates = np.flatnonzero(np.bitwise_count(self._bits ^ np.uint64(look.bits)) <= MAX_BITS)
        own, norms = _centered(look.small), self._norms[candidates]
        size = np.linalg.norm(own)
        both = self._small[candidates].astype(np.float32) @ own.reshape(-1)  # `own` is centered: theirs need not be
        squares = np.maximum(0, size**2 + norms**2 - 2 * both)
        differences = np.sqrt(squares) / np.maximum(1e-6, np.minimum(size, norms))
        order = np.argsort(differences, kind="stable")
        order = order[differences[order] <= MAX_DIFFERENCE]
        return [(int(self._index[candidates[i]]), float(differences[i])) for i in order]


class Images:
    """Fingerprints by path, each file decoded once, in threads; what it keeps of an image is a kilobyte at most."""

    def __init__(self, look: bool = False, threads: int | None = None):
        self._look, self._threads = look, threads or min(4, os.cpu_count() or 1)  # each may hold a large image
        self._known: dict[str, Fingerprint | str] = {}  # or what is wrong with the image

    def of(self, paths: Iterable[str]) -> list[Fingerprint | str]:
        """The fingerprint of each image, or what is wrong with it."""
        return [self._of(path) for path in paths]

    def _of(self, path: str) -> Fingerprint | str:
        if path not in self._known:
            try:
                self._known[path] = fingerprint(path, self._look)
            except BadImage as error:
                self._known[path] = str(error)
        return self._known[path]

    def along(
        self, items: Iterable[_Item], paths: Callable[[_Item], Sequence[str]]
    ) -> Iterator[tuple[_Item, list[Fingerprint | str]]]:
        """Each item, in order, with the fingerprints of its images; a few items ahead are being decoded."""
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            ahead: collections.deque = collections.deque()
            for item in items:
                ahead.append((item, pool.submit(self.of, paths(item)) if paths(item) else None))
                while len(ahead) > 2 * self._threads:
                    yield _finished(ahead.popleft())
            while ahead:
                yield _finished(ahead.popleft())


def _finished(pair: tuple) -> tuple:
    item, future = pair
    return item, future.result() if future else []


# ---------------------------------------------------------------------- texts


def words(text: str) -> list[str]:
    """The words and signs of a question in one spelling: without case, image marks, punctuation and LaTeX's braces."""
    text = unicodedata.normalize("NFKC", text.replace(IMAGE_MARK, " ")).casefold()
    return _WORD.findall(text.translate(_SIGNS))


def spelling(text: str) -> str:
    """One spelling for equal questions: the words, or the text itself where it has none."""
    return " ".join(words(text)) or " ".join(text.split())


def shingles(text_words: Sequence[str], length: int = 5) -> np.ndarray:
    """Sorted 64-bit hashes [S] of the runs of `length` words; of a shorter text, of the whole."""
    length = max(1, min(length, len(text_words)))
    runs = {" ".join(text_words[i : i + length]) for i in range(len(text_words) - length + 1)}
    digests = b"".join(hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return np.sort(np.frombuffer(digests, np.uint64))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The share of the shingles of two texts that both have; 0 where neither has any."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


class TextIndex:
    """Exact Jaccard similarities of a text with many: an inverted index, no sampling and no guess."""

    def __init__(self, texts: Sequence[np.ndarray]):
        """`texts`: the shingles of each."""
        self._lengths = np.array([len(text) for text in texts], np.int64)
        everything = np.concatenate(texts) if texts else np.zeros(0, np.uint64)
        owner = np.repeat(np.arange(len(texts)), self._lengths)
        order = np.argsort(everything, kind="stable")
        self._shingles, starts = np.unique(everything[order], return_index=True)
        self._owners = owner[order]
        self._starts = np.append(starts, len(everything))

    def similar(self, text: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """The texts [N] of at least this similarity, by index, the most similar first; and the similarities [N]."""
        nothing = np.zeros(0, np.int64), np.zeros(0)
        if not len(self._shingles) or not len(text):
            return nothing
        place = np.minimum(np.searchsorted(self._shingles, text), len(self._shingles) - 1)
        place = place[self._shingles[place] == text]
        if not len(place):
            return nothing
        owners = np.concatenate([self._owners[self._starts[p] : self._starts[p + 1]] for p in place])
        both = np.bincount(owners, minlength=len(self._lengths))
        scores = both / np.maximum(1, len(text) + self._lengths - both)
        found = np.flatnonzero(scores >= threshold)
        found = found[np.argsort(-scores[found], kind="stable")]
        return found, scores[found]
