"""Perception errors without a judge: the same questions with the figure's facts as text.

The text stands in place of the image ("text"). Where the model's own words for what is seen are known, its response can
also be begun with them ("begun"): small models that never read such texts know those. A wrong answer that turns right
was limited by perception, one that stays wrong by what comes after it. A right answer that turns wrong says how far the
text itself disturbs, and is subtracted. Every question is answered several times each way: one flip at a temperature
above 0 is chance.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from capcur_jax.data.problem import Problem
from capcur_jax.data.prompts import PromptBuilder
from capcur_jax.data.sources import easy_vqa
from capcur_jax.devices import distributed
from capcur_jax.evaluation import statistics
from capcur_jax.models.inputs import BadInput
from capcur_jax.records.text import number
from capcur_jax.rewards.reward import Reward
from capcur_jax.rollout.engine import Engine, Sampling

SAMPLES = 4  # answers to a question with its image, and as many each other way
WAYS = {"text": "text for the image", "begun": "response begun with what is seen"}
FILE = "counterfactual.json"
_EASY_VQA = re.compile(r"(train|test)-(\d+)-\w+-\d+")
_FACTS = ("shape", "color", "position", "size")
_SEEN = {"corners": "shape", "prices": "shape", "code": "color"}  # what a visual kind needs
_WORD = re.compile(r"[^\W_]+(?:\.\d+)?")


class Twin(NamedTuple):
    """A question, the text that holds its figure's facts, and how the model begins when it has seen them ("": not
    known)."""

    problem: Problem
    facts: str
    beginning: str = ""

    @property
    def told(self) -> Problem:
        """The question with the text, without the image."""
        text = f"{self.facts} {self.problem.problem.replace('<image>', '').strip()}"
        return dataclasses.replace(self.problem, problem=text, images=())


def twins(problems: Iterable[Problem]) -> tuple[list[Twin], dict[str, int]]:
    """The questions of which there are facts, and how many others there are and why.

    Facts are those of `metadata.caption`, or easy-VQA's own for the sets that are built from it.
    """
    found: list[Twin] = []
    left_out = {"without image": 0, "without a text of the figure": 0, "whose text holds the answer": 0}
    for problem in problems:
        facts = facts_of(problem)
        if not problem.images:
            left_out["without image"] += 1
        elif not facts:
            left_out["without a text of the figure"] += 1
        elif reveals(facts, problem.answers or (problem.answer,)):
            left_out["whose text holds the answer"] += 1
        else:
            found.append(Twin(problem, facts, _beginning(problem)))
    return found, {reason: count for reason, count in left_out.items() if count}


def facts_of(problem: Problem) -> str:
    """What the figure shows, in words; "" where it is not known."""
    return facts_text(problem.id, problem.metadata.get("caption"), problem.images)


def facts_text(name: str, caption: Any, images: Sequence[Any]) -> str:
    """The same of a row's id, its caption (None: it has none) and its images."""
    if isinstance(caption, str) and caption.strip():
        return caption.strip()
    found = _EASY_VQA.fullmatch(name)
    # Whoever names his own rows so has other images.
    own = found and [os.path.join(*Path(image).parts[-3:]) for image in images] == [
        os.path.join("images", found[1], f"{found[2]}.png")
    ]
    image = _easy_vqa_images(found[1]).get(int(found[2])) if found and own else None
    return easy_vqa_text(image) if image else ""


def _beginning(problem: Problem) -> str:
    """The sentence of easy-VQA's worked answers, such as "The shape is red."; never a user's text, which is not
    checked for control tokens where a prompt has ended."""
    found, seen = _EASY_VQA.fullmatch(problem.id), _SEEN.get(problem.kind)
    if problem.metadata.get("caption") or not found or not seen or not facts_of(problem):
        return ""
    value = _easy_vqa_images(found[1])[int(found[2])]
    return easy_vqa.worked(seen, {seen: getattr(value, seen)})[0]


@functools.cache
def _easy_vqa_images(folder: str) -> Mapping[int, easy_vqa.ImageFacts]:
    splits = ("test",) if folder == "test" else ("train", "validation")
    return {image.number: image for split in splits for image in easy_vqa.image_facts(split)}


def easy_vqa_text(image: easy_vqa.ImageFacts) -> str:
    """For example "The shape is a circle. The shape is red. The shape is at the top left. The shape is small."

    The sentences are those in which the rows' worked answers say what is seen; what is not certain is left out."""
    known = {kind: value for kind in _FACTS if (value := getattr(image, kind))}
    return " ".join(easy_vqa.worked(kind, {kind: value})[0] for kind, value in known.items())


def reveals(facts: str, answers: Sequence[str]) -> bool:
    """Whether a text holds one of the answers as whole words or a whole number: copying would be enough."""
    words = " ".join(_WORD.findall(facts.lower()))
    return any(
        f" {answer} " in f" {words} " for one in answers if (answer := " ".join(_WORD.findall(one.lower())))
    )  # fmt: skip


# ---------------------------------------------------------------------- telling


HEAD = ("set", "facts as", "answers", "wrong > right", "still wrong", "right > wrong", "of perception")


def table(kept: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows under HEAD of what FILE holds, in per cent; sets of which nothing could be asked are left out."""
    names = ("wrong_right", "wrong_wrong", "right_wrong", "limited_of_wrong")
    return [
        (name, way, found["questions"] * found["samples"], *(_percent(found[key]) for key in names))
        for name, ways in kept["sets"].items()
        for way in WAYS
        if (found := ways.get(way))
    ]


def note(kept: Mapping[str, Any]) -> str:
    """What has to be known beside the table."""
    said = [
        f"Per cent of answers, at temperature {kept['temperature']:g}. text: the figure's facts in place of the image; "
        "begun: the image, and a response that begins with what is to be seen. Of perception: the share of wrong "
        "answers that the facts mend, less right > wrong. Far below 0: the model can't use facts given so."
    ]
    for name, ways in kept["sets"].items():
        for way in WAYS:
            if (found := ways.get(way)) and found["limited_of_wrong"]:
                low, high = (number(value and 100 * value, ".1f") or "?" for value in found["limited_of_wrong"][1:])
                said.append(f"{name}, {way}: of perception {low} to {high} (95 %).")
                chance = _percent(found["again"])
                said.append(f"Chance alone turns {chance} to right, and as many to wrong.")
        if ways["left_out"]:
            counted = ", ".join(f"{count:,} {reason}" for reason, count in ways["left_out"].items())
            said.append(f"{name}, not asked: {counted}.")
    return " ".join(dict.fromkeys(said))


def shown(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Table and note as the report of a run shows them, which knows nothing of evaluations."""
    return {"head": HEAD, "rows": table(kept), "note": note(kept)}


def _percent(found: Sequence[float] | None) -> str:
    return f"{100 * found[0]:.1f}" if found else "-"


# ---------------------------------------------------------------------- asking


def ways_of(pairs: Sequence[Twin]) -> list[str]:
    """How all of the questions can be put."""
    return ["image", "text", *(["begun"] if all(pair.beginning for pair in pairs) else [])]


def ask(
    pairs: Sequence[Twin],
    *,
    engine: Engine,
    builder: PromptBuilder,
    reward: Reward,
    sampling: Sampling,
    seed: int,
    batch: int,
    samples: int = SAMPLES,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Answers every question with its image, and each of WAYS.

    Args:
      batch: questions that are asked together, each `samples` times.

    Returns:
      Of each way its `outcome`; left_out: reason -> how many questions could not be asked.
    """
    ways = ways_of(pairs)
    # [questions, ways, samples]; of several processes each asks its share.
    right, known = np.zeros((len(pairs), len(ways), samples)), np.zeros((len(pairs), len(ways)))
    for place, way in enumerate(ways):
        build = functools.partial(_prompt, builder, way)
        for start in range(0, len(pairs), batch):
            size = min(batch, len(pairs) - start)
            mine = range(start + jax.process_index(), start + size, jax.process_count())
            with ThreadPoolExecutor() as pool:  # the workers that decode images are kept busy
                built = list(zip(mine, pool.map(build, [pairs[at] for at in mine]), strict=True))
            ready = [(at, prompt) for at, prompt in built if prompt is not None]
            # One program serves all ways: calls without images are told that images may come.
            groups = engine.generate([prompt for _, prompt in ready], sampling, samples, seed + start, True)
            answered = [(at, group) for (at, _), group in zip(ready, groups, strict=True) if group]
            asked = [pairs[at].problem for at, group in answered for _ in group]
            texts = [builder.processor.response(sample.tokens) for _, group in answered for sample in group]
            scores = iter(reward(asked, texts))
            for at, group in answered:
                credit = np.array([next(scores).accuracy for _ in group], float)
                known[at, place] = np.isfinite(credit).all()  # a reward on a scale of its own says nothing of it
                right[at, place] = credit >= 1
            progress(size)
    right, known = distributed.exchange(right).sum(0), distributed.exchange(known).sum(0)
    both = np.flatnonzero(known.all(1))
    found: dict[str, Any] = {"left_out": {}}
    if len(both) < len(pairs):
        found["left_out"] = {"whose prompt could not be asked": len(pairs) - len(both)}
    if len(both):
        clusters = [pairs[at].problem.images for at in both]
        found |= {
            way: outcome(right[both, 0], right[both, place], clusters) for place, way in enumerate(ways) if place
        }  # fmt: skip
    return found


def _prompt(builder: PromptBuilder, way: str, pair: Twin) -> Any:
    """None where it can't be built: counted by the builder."""
    if way != "begun":
        return builder.try_build(pair.told if way == "text" else pair.problem)
    opening = "" if builder.processor.opened else "<think>"
    try:
        return builder.prompt(builder.render(pair.problem) + opening + pair.beginning, pair.problem.images)
    except BadInput as error:
        builder.skip(pair.problem, error)
        return None


def outcome(image_QxS: np.ndarray, text_QxS: np.ndarray, clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """What becomes of answers when the image is told.

    Args:
      image_QxS, text_QxS: 0 or 1, whether each sample of each question is right; two samples or more.
      clusters: [questions], what belongs together, such as the image.

    Returns:
      Shares of all answers, each [share, low, high] with its 95 % interval (None: a single cluster has none):
      wrong_right, wrong_wrong, right_wrong, right_right: of an answer with the image and one with the text.
      again: of two answers with the image, that the first is wrong and the second right: what chance alone turns.
      limited: wrong_right minus right_wrong. limited_of_wrong: the same of the wrong answers alone; None without any.
    """
    samples = image_QxS.shape[1]
    if samples < 2 or text_QxS.shape[1] < 2:
        raise ValueError("a counterfactual needs two samples of a question or more")
    # Samples are independent given the question, so that products of shares are chances without bias.
    image, text = image_QxS.mean(1), text_QxS.mean(1)
    shares = {
        "wrong_right": (1 - image) * text,
        "wrong_wrong": (1 - image) * (1 - text),
        "right_wrong": image * (1 - text),
        "right_right": image * text,
        "again": image * (1 - image) * samples / (samples - 1),  # of two different samples
    }
    found: dict[str, Any] = {
        "questions": len(image),
        "samples": samples,
        **{name: _listed(statistics.mean_interval(values, clusters)) for name, values in shares.items()},
        "limited": _listed(
            statistics.mean_interval(shares["wrong_right"] - shares["right_wrong"], clusters, bounded=False)
        ),
    }

    def of_wrong(rows: np.ndarray) -> float:
        wrong = (1 - image[rows]).sum()
        return float((text[rows] - image[rows]).sum() / wrong) if wrong else 0.0

    wrong = float((1 - image).sum())
    found["limited_of_wrong"] = None
    if wrong:
        found["limited_of_wrong"] = _listed(statistics.jackknife_interval(of_wrong, len(image), clusters))
    return found


def _listed(interval: statistics.Interval) -> list[float | None]:
    """For JSON: None for limits that a single cluster can't have."""
    return [value if math.isfinite(value) else None for value in interval]
