"""Capabilities "perception" and "visual" on the 5,000 real images of the package easy-vqa (64 x 64, MIT license).

Each image shows one shape of one color. Perception asks for what is seen: shape and color (easy-VQA's own open
questions; its yes/no ones are mostly guessable without the image), and the shape's position and size as measured from
the pixels. Visual asks for a number to be computed from what is seen. The package's test images are the test split;
about 5 % of its train images, picked by hash, are the validation split.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from capcur_jax.data.built import build_set
from capcur_jax.data.problem import Problem, even_shares, stable_hash
from capcur_jax.files import write_atomically

VERSION = "easy-vqa-3"  # raise it with every change of the rows
KINDS = {"perception": ("shape", "color", "position", "size"), "visual": ("corners", "prices", "code")}
COUNTS = {"train": 9600, "validation": 300, "test": 1000}

SHAPES = ("circle", "rectangle", "triangle")
CORNERS = {"circle": 0, "rectangle": 4, "triangle": 3}
COLORS = {  # in the order of their codes, 1 to 8
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
COLOR_NAMES = tuple(COLORS)
SIZES = ("small", "medium", "large")

MIDDLE, MIDDLE_MARGIN = 32.0, 3.0  # pixels; a center this close to a middle line has no certain position
SIZE_CUTS, SIZE_MARGIN = (18.5, 25.5), 1.0  # pixels; the terciles of the longest side over the train images

WORDINGS = {
    "position": ("Where is the shape?", "Where in the image is the shape?", "In which corner is the shape?"),
    "size": ("How big is the shape?", "What size is the shape?", "Is the shape small, medium or large?"),
    "corners": (
        "Each corner of the shape costs {price} coins. How much do all corners cost?",
        "A corner costs {price} coins. How much do the corners of the shape cost?",
    ),
    "prices": (
        "A circle costs {circle}, a rectangle {rectangle}, a triangle {triangle} coins. "
        "How much do {count} of this shape cost?",
    ),
    "code": (
        f"Color codes: {' '.join(f'{name} {code}' for code, name in enumerate(COLOR_NAMES, start=1))}. "
        "What is the code of the shape's color plus {plus}?",
    ),
}


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """What is certain about one image; None where it is not."""

    folder: str  # "train" | "test", as in the package
    number: int
    shape: str | None
    color: str | None
    position: str | None
    size: str | None
    open_questions: dict[str, tuple[str, ...]]  # kind ("shape", "color") -> easy-VQA's own distinct questions


def build(directory: str | os.PathLike, capability: str) -> dict[str, Path]:
    """Gives the files of the three splits below `directory`, building them and the images on first use (seconds).

    Args:
      capability: "perception" or "visual"; both sets share `directory/images/{train,test}/<number>.png`.

    Raises:
      ValueError: another capability.
      ModuleNotFoundError: the package easy-vqa is not installed.
    """
    if capability not in KINDS:
        raise ValueError(f"easy_vqa has no capability {capability!r}; use one of {', '.join(KINDS)}")
    copy_images(directory, ("train", "test"))

    def make() -> dict[str, list[Problem]]:
        rows = {}
        for split, count in COUNTS.items():
            by_kind = [
                [problem for problem, _ in questions(directory, split, kind, share)]
                for kind, share in even_shares(count, KINDS[capability]).items()
            ]
            # The kinds take turns, so that any first part of the file is balanced too.
            rows[split] = [row for turn in itertools.zip_longest(*by_kind) for row in turn if row is not None]
        return rows

    return build_set(directory, capability, VERSION, make)


def package_data() -> Path:
    """The data folder of the installed package, found without importing it (importing reads every question)."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the easy-VQA images come with the package easy-vqa; run: pip install easy-vqa")
    return Path(spec.origin).parent / "data"


def copy_images(directory: str | os.PathLike, folders: Iterable[str]) -> None:
    """Puts the package's images at `directory/images/<folder>/<number>.png` where they are missing or cut short."""
    for folder in folders:
        target = Path(directory) / "images" / folder
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(target)} if target.is_dir() else {}
        for entry in sorted(os.scandir(package_data() / folder / "images"), key=lambda entry: entry.name):
            if entry.name.endswith(".png") and sizes.get(entry.name) != entry.stat().st_size:
                write_atomically(target / entry.name, Path(entry.path).read_bytes(), sync=False)


def questions(
    directory: str | os.PathLike, split: str, kind: str, count: int, variants: int = 1
) -> list[tuple[Problem, dict]]:
    """At most `count` questions of a kind with their facts (what `worked` takes), balanced over the seen fact.

    Args:
      directory: where `copy_images` put the images.
      variants: how often an image may be asked, each time in another wording or with other numbers.
    """
    capability = next(name for name, kinds in KINDS.items() if kind in kinds)
    groups: dict[str, list[tuple[Problem, dict]]] = collections.defaultdict(list)
    for variant, image in itertools.product(range(variants), image_facts(split)):
        asked = ask(kind, image, variant)
        if asked is None:
            continue
        text, facts = asked
        row_id = f"{image.folder}-{image.number}-{kind}-{variant}"
        path = os.path.abspath(Path(directory) / "images" / image.folder / f"{image.number}.png")
        problem = Problem(row_id, text, worked(kind, facts)[1], (path,), capability, kind)
        groups[next(iter(facts.values()))].append((problem, facts))
    # Each group in an order that looks random; then the groups take turns until there are enough.
    ordered = [sorted(group, key=lambda row: stable_hash("pick", row[0].id)) for _, group in sorted(groups.items())]
    turns = (row for turn in itertools.zip_longest(*ordered) for row in turn if row is not None)
    return sorted(itertools.islice(turns, count), key=lambda row: stable_hash("order", row[0].id))


def ask(kind: str, image: ImageFacts, variant: int = 0) -> tuple[str, dict] | None:
    """The text and facts of one question, or None where the image lacks a certain fact or another such question.

    The first of the facts is the one that must be seen; numbers are picked by hash of image, kind and variant.
    """
    key = (image.folder, image.number, kind)

    def pick(what: str, options):
        return options[stable_hash(*key, variant, what) % len(options)]

    seen = {"corners": "shape", "prices": "shape", "code": "color"}.get(kind, kind)
    facts: dict = {seen: getattr(image, seen)}
    if facts[seen] is None:
        return None
    if kind in image.open_questions:
        texts = image.open_questions[kind]
        return (texts[variant], facts) if variant < len(texts) else None
    texts = WORDINGS[kind]
    text = texts[(stable_hash(*key, "wording") + variant) % len(texts)]
    if kind in ("position", "size"):
        return (text, facts) if variant < len(texts) else None
    if kind == "corners":
        facts["price"] = pick("price", range(2, 10))
        return text.format(price=facts["price"]), facts
    if kind == "prices":
        prices = pick("prices", tuple(itertools.permutations(range(2, 10), len(SHAPES))))
        facts |= {"prices": dict(zip(SHAPES, prices, strict=True)), "count": pick("count", range(2, 6))}
        return text.format(count=facts["count"], **facts["prices"]), facts
    facts["plus"] = pick("plus", range(2, 10))
    return text.format(plus=facts["plus"]), facts


def worked(kind: str, facts: dict) -> tuple[str, str]:
    """(reasoning, answer) of a question.

    Args:
      facts: {"shape" | "color" | "position" | "size": text}; with it {"price": int} for corners,
        {"prices": {shape: int}, "count": int} for prices, {"plus": int} for code.
    """
    solve: Callable[[dict], tuple[str, str]] | None = _WORKED.get(kind)
    if solve is None:
        raise ValueError(f"no kind {kind!r} of image question; one of {', '.join(_WORKED)}")
    return solve(facts)


def _worked_corners(facts: dict) -> tuple[str, str]:
    corners = CORNERS[facts["shape"]]
    return _computed(f"The shape is a {facts['shape']}. It has {corners} corners.", corners, "x", facts["price"])


def _worked_prices(facts: dict) -> tuple[str, str]:
    shape, price = facts["shape"], facts["prices"][facts["shape"]]
    return _computed(f"The shape is a {shape}. A {shape} costs {price} coins.", facts["count"], "x", price)


def _worked_code(facts: dict) -> tuple[str, str]:
    color = facts["color"]
    code = COLOR_NAMES.index(color) + 1
    return _computed(f"The shape is {color}. {color.capitalize()} has code {code}.", code, "+", facts["plus"])


def _computed(seen: str, left: int, sign: str, right: int) -> tuple[str, str]:
    result = left * right if sign == "x" else left + right
    return f"{seen} {left} {sign} {right} = {result}.", str(result)


_WORKED = {
    "shape": lambda facts: (f"The shape is a {facts['shape']}.", facts["shape"]),
    "color": lambda facts: (f"The shape is {facts['color']}.", facts["color"]),
    "position": lambda facts: (f"The shape is at the {facts['position']}.", facts["position"]),
    "size": lambda facts: (f"The shape is {facts['size']}.", facts["size"]),
    "corners": _worked_corners,
    "prices": _worked_prices,
    "code": _worked_code,
}


@functools.cache
def image_facts(split: str) -> tuple[ImageFacts, ...]:
    """The facts of every image of "train", "validation" or "test" (seconds for the first call)."""
    folder = "test" if split == "test" else "train"
    facts = _folder_facts(folder)
    if split == "test":
        return facts
    return tuple(f for f in facts if is_validation(f.number) == (split == "validation"))


def is_validation(number: int) -> bool:
    """Whether a train image of the package belongs to the validation split: about 5 %."""
    return stable_hash("easy-vqa validation", number) % 20 == 0


@functools.cache
def _folder_facts(folder: str) -> tuple[ImageFacts, ...]:
    data = package_data() / folder
    asked: dict[int, list[tuple[str, str]]] = collections.defaultdict(list)
    for text, answer, number in json.loads((data / "questions.json").read_text(encoding="utf-8")):
        asked[number].append((text, answer))
    return tuple(_facts_of(data, folder, int(path.stem), asked[int(path.stem)]) for path in _images_of(data))


def _images_of(data: Path) -> list[Path]:
    return sorted((data / "images").glob("*.png"), key=lambda path: int(path.stem))


def _facts_of(data: Path, folder: str, number: int, asked: list[tuple[str, str]]) -> ImageFacts:
    with Image.open(data / "images" / f"{number}.png") as image:
        # Every annotated color is the measured one, so the pixels speak for images whose questions name no color.
        color, center, side = measure(np.asarray(image.convert("RGB")))
    open_questions = {
        kind: tuple(dict.fromkeys(text for text, answer in asked if answer in answers))
        for kind, answers in (("shape", SHAPES), ("color", COLOR_NAMES))
    }
    return ImageFacts(
        folder=folder,
        number=number,
        shape=stated(asked, SHAPES),
        color=color if stated(asked, COLOR_NAMES) in (color, None) else None,
        position=position_of(*center),
        size=size_of(side),
        open_questions=open_questions,
    )


def stated(asked: Iterable[tuple[str, str]], values: Iterable[str]) -> str | None:
    """The one of `values` that an image's (question, answer) pairs agree on, else None.

    An open pair states a value in its question ("what color is the circle?") or its answer; "is there a circle?" states
    one where the answer is yes, "is there not a circle?" where it is no.
    """
    found = set()
    for text, answer in asked:
        words = set(re.findall("[a-z]+", text))
        negated = bool(words & {"no", "not"})
        if answer not in ("yes", "no") or (answer == "no") == negated:
            found |= (words | {answer}) & set(values)
    return found.pop() if len(found) == 1 else None


def measure(pixels_HxWx3: np.ndarray) -> tuple[str | None, tuple[float, float], int]:
    """Measures the one shape on a flat background.

    Args:
      pixels_HxWx3: uint8.

    Returns:
      Its color's name (None for a color that is not easy-VQA's), the (x, y) of its bounding box's center in pixels from
      the top left corner, and the box's longest side in pixels.
    """
    pixels = pixels_HxWx3.astype(np.int32)
    # A shape can hide one corner of the image at most, so the median of the four is the background.
    background = np.median(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    distance_HxW = np.abs(pixels - background).sum(axis=-1)
    row, column = np.unravel_index(np.argmax(distance_HxW), distance_HxW.shape)
    names = {value: name for name, value in COLORS.items()}
    color = names.get(tuple(pixels[row, column].tolist()))
    # Edge pixels blend both colors: those nearer to the shape's belong to it.
    rows, columns = np.nonzero(distance_HxW > distance_HxW.max() / 2)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    return color, (float(left + right) / 2, float(top + bottom) / 2), int(max(bottom - top, right - left))


def position_of(x: float, y: float) -> str | None:
    """The quarter of the image that holds the point (pixels from the top left), None near a middle line."""
    if min(abs(x - MIDDLE), abs(y - MIDDLE)) <= MIDDLE_MARGIN:
        return None
    return f"{'top' if y < MIDDLE else 'bottom'} {'left' if x < MIDDLE else 'right'}"


def size_of(side: int) -> str | None:
    """The size class of a longest side in pixels, None near a cut."""
    if min(abs(side - cut) for cut in SIZE_CUTS) <= SIZE_MARGIN:
        return None
    return SIZES[sum(side > cut for cut in SIZE_CUTS)]
