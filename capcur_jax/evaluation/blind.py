"""How far the text alone goes: the accuracy of the best guess without the image.

A visual set is worth training on only where its images are needed. The guessers here learn from the training rows'
texts and answers; the best of them says what an accuracy has to be compared with.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Callable, Iterator

from capcur_jax.data.problem import Problem

OFTEN = 5  # a text seen less often says too little about its answers
CONSTANTS = range(13)  # the unseen numbers that a formula may hold, such as corners or codes

_NUMBER = re.compile(r"\d+")
_Guesser = Callable[[Problem], str]


def blind_accuracy(train: list[Problem], test: list[Problem]) -> float:
    """The share of `test` that the best of several image-blind guessers, fit on `train`, answers right.

    The guessers answer with the most frequent training answer of the same text, of the same text with its numbers
    masked, or of the same kind; and, for questions with images, with the arithmetic formula over the text's numbers and
    one constant that was right most often in training (someone who knows the sums and bets on the likeliest image).

    Returns:
      The maximum over the guessers, by equal text of the answers; of several, so it errs towards a higher figure.

    Raises:
      ValueError: a list is empty.
    """
    if not train or not test:
        raise ValueError("blind_accuracy needs training and test rows; one of the lists is empty")
    guessers = [_by_kind(train), _by_masked_text(train), _by_text(train)]
    if any(row.images for row in test):  # in a text, sums over its numbers are the task itself
        guessers.append(_by_formula(train))
    return max(sum(guess(row) == row.answer for row in test) for guess in guessers) / len(test)


def _by_kind(train: list[Problem]) -> _Guesser:
    of_kind = _most_frequent((row.kind, row.answer) for row in train)
    fallback = collections.Counter(row.answer for row in train).most_common(1)[0][0]
    return lambda row: of_kind.get(row.kind, fallback)


def _by_masked_text(train: list[Problem]) -> _Guesser:
    of_text = _most_frequent((_masked(row), row.answer) for row in train)
    otherwise = _by_kind(train)
    return lambda row: of_text.get(_masked(row)) or otherwise(row)


def _by_text(train: list[Problem]) -> _Guesser:
    of_text = _most_frequent(((row.problem, row.answer) for row in train), at_least=OFTEN)
    otherwise = _by_masked_text(train)
    return lambda row: of_text.get(row.problem) or otherwise(row)


def _by_formula(train: list[Problem]) -> _Guesser:
    """The formula that was right most often among the rows of the same masked text, where texts hold numbers."""
    hits: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    frequent: collections.Counter = collections.Counter()
    for row in train:
        hits[row.kind, _masked(row)].update(name for name, answer in _formulas(row) if answer == row.answer)
        frequent[row.kind, _masked(row), row.answer] += 1
    otherwise = _by_text(train)
    best = {key: counter.most_common(1)[0] for key, counter in hits.items() if counter}

    def guess(row: Problem) -> str:
        name, count = best.get((row.kind, _masked(row)), ("", 0))
        plain = otherwise(row)
        if count <= frequent[row.kind, _masked(row), plain]:
            return plain
        return dict(_formulas(row))[name]

    return guess


def _formulas(row: Problem) -> Iterator[tuple[str, str]]:
    """(formula, its value as text): number o number of the text, and number o constant, for + - x."""
    numbers = [int(number[:9]) for number in _NUMBER.findall(row.problem)]
    named = [(f"n{index}", value) for index, value in enumerate(numbers)]
    others = named[:24] + [(f"c{value}", value) for value in CONSTANTS]  # a text full of numbers must not cost minutes
    for (left, a), (right, b) in itertools.product(named[:24], others):
        if left != right:
            yield f"{left}+{right}", str(a + b)
            yield f"{left}-{right}", str(a - b)
            yield f"{left}x{right}", str(a * b)


def _masked(row: Problem) -> str:
    return _NUMBER.sub("#", row.problem)


def _most_frequent(pairs, at_least: int = 1) -> dict:
    """key -> its most frequent value, for keys seen often enough; ties go to the value that sorts first."""
    values: dict = collections.defaultdict(collections.Counter)
    for key, value in pairs:
        values[key][value] += 1
    return {
        key: min(counter, key=lambda value: (-counter[value], value))
        for key, counter in values.items()
        if counter.total() >= at_least
    }
