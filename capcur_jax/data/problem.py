"""The record of one problem, and that of a row which can't be one."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from capcur_jax.answers.kinds import answer_type_of, hint_of

IMAGE_MARK = "<image>"
_HALF_PAIR = re.compile("[\ud800-\udfff]")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its gold answer; see the comments for what each field may hold."""

    id: str  # unique inside its file
    problem: str  # the question without any instruction; "<image>" marks say where images go, else they go in front
    answer: str  # gold answer as text, the first of `answers`; "" only where `response` is given
    images: tuple[str, ...] = ()  # absolute paths
    capability: str = ""  # "perception" | "text" | "visual" | a user's own
    kind: str = ""  # finer kind, e.g. "shape" or "corners"
    response: str | None = None  # the target of an SFT row; of a caption set the caption
    answer_type: str = ""  # one of kinds.ANSWER_TYPES, or "" where there is no answer; found out where it is not given
    source: str = ""  # the data set that it comes from
    pass_rate: float | None = None  # the share of a model's responses that were right (paper, difficulty)
    # Whose: {"model", "samples", "temperature", "max_new_tokens", ...}.
    pass_rate_by: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    predictions: tuple[str, ...] = ()  # the answers found in those responses
    correctness: tuple[float, ...] = ()  # the accuracy of each
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # free; JSON values
    answers: tuple[str, ...] = ()  # all that count as right where there are several, `answer` first
    # What the reader changed of the row, in a few words each that are counted; not stored.
    repaired: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self):
        if self.answers and self.answers[0] != self.answer:
            raise ValueError(f"{self.id}: `answers` must begin with `answer`")
        if not self.answer_type:
            object.__setattr__(self, "answer_type", answer_type_of(self.answer, hint_of(self.problem)))


class Drop(NamedTuple):
    """A row that can't be used. Never silently: whoever leaves a row out yields or counts one of these."""

    where: str  # "file:line", "file, row 3", the path of an image
    reason: str  # a few words that are counted, such as "no answer" or "broken image"
    detail: str  # what is wrong with this one; what to do about it

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


class BadRow(ValueError):
    """What is wrong with one row: the reason it is counted under, and "what; remedy"."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)


def refuse_half_pair(text: str, key: str) -> None:
    """Raises BadRow for half of a surrogate pair, which is no text."""
    if not text.isascii() and _HALF_PAIR.search(text):
        detail = f"`{key}` holds half of a surrogate pair, which no tokenizer takes; repair the text"
        raise BadRow(f"bad {key}", detail)


def short(text: str, length: int = 40) -> str:
    """A value for a message, cut so that no prompt or base64 image lands in a log."""
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def stable_hash(*parts: object) -> int:
    """A 64-bit integer that depends on the parts' texts only: the same in every process, Python and machine."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def even_shares(total: int, kinds: Sequence[str]) -> dict[str, int]:
    """How many of `total` rows each kind gets; the first kinds get one more where it does not divide."""
    return {kind: total // len(kinds) + (i < total % len(kinds)) for i, kind in enumerate(kinds)}
