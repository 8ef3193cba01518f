"""The SFT corpus that makes the small base checkpoint: captions, and answered questions.

Real base models have seen many captions and can answer, but not well. So this base gets eyes from captions, and too
few answered questions to be sure of how to use them. Only images and texts of the train splits are in its train
file, and only those of the validation splits in its validation file; nothing of a test split is used.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from capcur_jax.answers.response import boxed_response
from capcur_jax.data.built import build_set
from capcur_jax.data.problem import Problem, even_shares, stable_hash
from capcur_jax.data.sources import easy_vqa, word_problems

VERSION = f"tiny-base-6/{easy_vqa.VERSION}/{word_problems.VERSION}"  # raise it with every change of the rows

BROKEN = 0.03  # share of question responses without the asked format, so that the format reward has work too

COUNTS = {
    "train": {"perception": 6_000, "text": 18_000, "visual": 6_000},
    "validation": {"perception": 300, "text": 300, "visual": 300},
}
MIXED = 6_000  # of the texts are in the mixed set
VARIANTS = 3  # how often one image may be asked a kind of question
CAPTION_WORDINGS = ("Describe the image.", "What is in the image?", "What does the image show?")
CAPTIONS_PER_IMAGE = {"train": 3, "validation": 1}


def build(directory: str | os.PathLike, capability: str = "base") -> dict[str, Path]:
    """Gives the files below `directory`, building them and the train images on first use (seconds).

    "captions" and "sums" (answered texts) are for a first stage that learns to see and to reckon; "base" mixes some of
    both with answered questions about images.
    The "test" file is the validation file: SFT is judged by its loss there, and the real tests are the other sets'.
    `answer` is the right answer, whatever the response says ("" for captions).

    Raises:
      ValueError: another capability than these.
    """
    makers = {"base": rows, "captions": captions, "sums": sums}
    if capability not in makers:
        raise ValueError(f"tiny_base has no capability {capability!r}; use one of {', '.join(makers)}")
    easy_vqa.copy_images(directory, ("train",))

    def make() -> dict[str, list[Problem]]:
        return {split: makers[capability](directory, split) for split in COUNTS}

    files = build_set(directory, capability, VERSION, make, splits=tuple(COUNTS))
    return files | {"test": files["validation"]}


def rows(directory: str | os.PathLike, split: str) -> list[Problem]:
    """Captions, answered texts and answered questions about images of "train" or "validation", mixed."""
    answered = sums(directory, split)[:MIXED]
    for capability, kinds in easy_vqa.KINDS.items():
        for kind, count in even_shares(COUNTS[split][capability], kinds).items():
            asked = easy_vqa.questions(directory, split, kind, count, variants=VARIANTS)
            answered += [respond(problem, facts) for problem, facts in asked]
    return sorted(captions(directory, split) + answered, key=lambda row: stable_hash("base order", row.id))


def sums(directory: str | os.PathLike, split: str) -> list[Problem]:
    """Answered texts."""
    return [respond(problem, facts) for problem, facts in word_problems.questions(split, "base", COUNTS[split]["text"])]


def respond(problem: Problem, facts: dict) -> Problem:
    """The row with the right answer; whether its format is broken follows from the row's id."""
    worked = word_problems.worked if problem.kind in word_problems.KINDS else easy_vqa.worked
    reasoning, answer = worked(problem.kind, facts)
    response = boxed_response(reasoning, answer)
    if stable_hash("broken", problem.id) / 2**64 < BROKEN:
        broken = (f"<think>{reasoning}</think> {answer}", f"<think>{reasoning} \\boxed{{{answer}}}", reasoning)
        response = broken[stable_hash("broken how", problem.id) % len(broken)]
    return dataclasses.replace(problem, response=response)


def captions(directory: str | os.PathLike, split: str) -> list[Problem]:
    """One row for each image whose shape and color are certain, and for each of its wordings."""
    found = []
    for image in easy_vqa.image_facts(split):
        if image.shape is None or image.color is None:
            continue
        path = os.path.abspath(Path(directory) / "images" / image.folder / f"{image.number}.png")
        kind = "caption:whole" if image.size and image.position else "caption:part"
        for turn in range(CAPTIONS_PER_IMAGE[split]):
            row_id = f"{image.folder}-{image.number}-caption-{turn}"
            wording = CAPTION_WORDINGS[(image.number + turn) % len(CAPTION_WORDINGS)]
            found.append(Problem(row_id, wording, "", (path,), "caption", kind, response=caption(image)))
    return found


def caption(image: easy_vqa.ImageFacts) -> str:
    """For example "A small red circle at the top left."; size and position are left out where they aren't certain."""
    words = " ".join(word for word in ("A", image.size, image.color, image.shape) if word)
    return f"{words} at the {image.position}." if image.position else f"{words}."
