"""Perception errors without a judge: the same questions with the figure's facts as text in place of the image.

A wrong answer that turns right was limited by perception, one that stays wrong by what comes after it. A right answer
that turns wrong says how far the text itself disturbs, and is subtracted. Every question is answered several times
either way: one flip at a temperature above 0 is chance.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from capcur_jax.data.problem import Problem
from capcur_jax.data.sources import easy_vqa
from capcur_jax.devices import distributed
from capcur_jax.evaluation import statistics
from capcur_jax.rewards.reward import Reward
from capcur_jax.rollout.engine import Engine, Sampling

SAMPLES = 4  # answers to a question with its image, and as many with its text
FILE = "counterfactual.json"
_EASY_VQA = re.compile(r"(train|test)-(\d+)-\w+-\d+")
_FACTS = ("shape", "color", "position", "size")
_WORD = re.compile(r"[^\W_]+(?:\.\d+)?")


class Twin(NamedTuple):
    """A question, and the text that holds its figure's facts."""

    problem: Problem
    facts: str

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
            found.append(Twin(problem, facts))
    return found, {reason: count for reason, count in left_out.items() if count}


def facts_of(problem: Problem) -> str:
    """What the figure shows, in words; "" where it is not known."""
    caption = problem.metadata.get("caption")
    if isinstance(caption, str) and caption.strip():
        return caption.strip()
    found = _EASY_VQA.fullmatch(problem.id)
    return _easy_vqa_facts(found[1]).get(int(found[2]), "") if found and problem.images else ""


@functools.cache
def _easy_vqa_facts(folder: str) -> Mapping[int, str]:
    splits = ("test",) if folder == "test" else ("train", "validation")
    images = [image for split in splits for image in easy_vqa.image_facts(split)]
    return {image.number: easy_vqa_text(image) for image in images}


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


# ---------------------------------------------------------------------- asking


def ask(
    pairs: Sequence[Twin],
    *,
    engine: Engine,
    build: Callable[[Problem], Any],
    response: Callable[[Any], str],
    reward: Reward,
    sampling: Sampling,
    seed: int,
    batch: int,
    samples: int = SAMPLES,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Answers every question with its image and with its text; see `outcome` for what is returned, `left_out` added.

    Args:
      build: a problem's prompt, or None where it can't be built.
      response: tokens -> text.
      batch: questions that are asked together, each `samples` times.
    """
    # [questions, with the image and with the text, samples]; of several processes each asks its share.
    right, known = np.zeros((len(pairs), 2, samples)), np.zeros((len(pairs), 2))
    for way, problems in enumerate(([pair.problem for pair in pairs], [pair.told for pair in pairs])):
        for start in range(0, len(problems), batch):
            size = min(batch, len(problems) - start)
            mine = range(start + jax.process_index(), start + size, jax.process_count())
            with ThreadPoolExecutor() as pool:  # the workers that decode images are kept busy
                built = list(zip(mine, pool.map(build, [problems[at] for at in mine]), strict=True))
            ready = [(at, prompt) for at, prompt in built if prompt is not None]
            # One program serves both ways: calls without images are told that images may come.
            groups = engine.generate([prompt for _, prompt in ready], sampling, samples, seed + start, True)
            answered = [(at, group) for (at, _), group in zip(ready, groups, strict=True) if group]
            asked = [problems[at] for at, group in answered for _ in group]
            scores = iter(reward(asked, [response(sample.tokens) for _, group in answered for sample in group]))
            for at, group in answered:
                known[at, way] = 1
                right[at, way] = [next(scores).accuracy >= 1 for _ in group]
            progress(size)
    right, known = distributed.exchange(right).sum(0), distributed.exchange(known).sum(0)
    both = np.flatnonzero(known.all(1))
    refused = {"whose prompt could not be asked": len(pairs) - len(both)} if len(both) < len(pairs) else {}
    if not len(both):
        return {"questions": 0, "left_out": refused}
    clusters = [pairs[at].problem.images for at in both]
    return {**outcome(right[both, 0], right[both, 1], clusters), "left_out": refused}


def outcome(image_QxS: np.ndarray, text_QxS: np.ndarray, clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """What becomes of answers when the image is told.

    Args:
      image_QxS, text_QxS: 0 or 1, whether each sample of each question is right; two samples or more.
      clusters: [questions], what belongs together, such as the image.

    Returns:
      Shares of all answers, each [share, low, high] with its 95 % interval:
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
        **{name: list(statistics.mean_interval(values, clusters)) for name, values in shares.items()},
        "limited": list(
            statistics.mean_interval(shares["wrong_right"] - shares["right_wrong"], clusters, bounded=False)
        ),
    }

    def of_wrong(rows: np.ndarray) -> float:
        wrong = (1 - image[rows]).sum()
        return float((text[rows] - image[rows]).sum() / wrong) if wrong else 0.0

    wrong = float((1 - image).sum())
    found["limited_of_wrong"] = list(statistics.jackknife_interval(of_wrong, len(image), clusters)) if wrong else None
    return found
