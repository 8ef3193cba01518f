"""The perception-sensitive filter: keeps questions that models answer right from the caption, wrong from the image.

A row with image I, caption C, question Q and answer A is kept if and only if, for every filter model M,
M(Q | I) != A and M(Q | C) = A: the caption pass shows that the question can be answered, the image
pass that models fail at seeing. They answer greedily with a few new tokens. A reply without a letter is "cannot
tell", and the row is dropped.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from capcur_jax.answers.letters import LETTERS, letter_in, option_letters
from capcur_jax.curation.filter_models import PASSES, Asked, FilterModel, How, parts_of
from capcur_jax.data.problem import IMAGE_MARK, Drop, Problem
from capcur_jax.records.journal import Journal, digest_of, key_of
from capcur_jax.records.terminal import Progress

LETTER_ALONE = "Reply with the letter of the right option and nothing else."
FROM_CAPTION = "This is the description of an image:\n\n{caption}\n\nA question about the image:\n\n{question}\n"
CUE = "\nAnswer:"  # after a bare text, which would go on with anything
DIGEST = hashlib.sha256((LETTER_ALONE + FROM_CAPTION + CUE).encode()).hexdigest()[:12]

KEPT = "kept"
REASONS = ("image: right", "image: no letter", "caption: wrong", "caption: no letter")
_LONGEST = 400  # characters of a reply that are stored


def verdict(answer: str, image: str | None, caption: str | None) -> str:
    """KEPT, or the first of REASONS for which one model drops a row, from the letters of its two passes."""
    if image == answer:
        return REASONS[0]
    if image is None:
        return REASONS[1]
    if caption is None:
        return REASONS[3]
    return KEPT if caption == answer else REASONS[2]


@dataclasses.dataclass(frozen=True)
class Row:
    """A problem that can be judged."""

    problem: Problem
    answer: str  # one of `letters`
    letters: str  # of the options
    caption: str

    def asked(self, which: str, caption_chat: bool) -> Asked:
        """What a model gets in a pass."""
        if which == "image":
            parts = parts_of(self.problem.problem.rstrip() + "\n" + LETTER_ALONE, self.problem.images)
            return Asked(self.problem.id, tuple(parts), bare=False)
        question = self.problem.problem.replace(IMAGE_MARK, "").strip()
        text = FROM_CAPTION.format(caption=self.caption.strip(), question=question) + LETTER_ALONE
        return Asked(self.problem.id, (text if caption_chat else text + CUE,), bare=not caption_chat)

    def key(self, which: str) -> str:
        """Of the journal: another question, caption or image is another row."""
        if which == "caption":
            return key_of(f"caption {self.problem.id}", self.problem.problem, self.caption)
        return key_of(f"image {self.problem.id}", self.problem.problem, *map(digest_of, self.problem.images))


@dataclasses.dataclass(frozen=True)
class Judged:
    """A row, what all models said of it in its metadata, and each model's verdict."""

    problem: Problem
    answer: str
    verdicts: dict[str, str]

    @property
    def reason(self) -> str:
        """KEPT, or that of the first model that drops it."""
        return next((verdict for verdict in self.verdicts.values() if verdict != KEPT), KEPT)


def readable(problem: Problem) -> Row | Drop:
    """A row of the filter, or why the problem can't be one."""
    where = f"row {problem.id}"
    options = problem.metadata.get("options")
    known = isinstance(options, list) and 2 <= len(options) <= len(LETTERS)
    letters = LETTERS[: len(options)] if known else option_letters(problem.problem)
    answer = letter_in(problem.answer, letters)
    if answer is None:
        return Drop(where, "answer is no letter", f"the answer must be one of {', '.join(letters)}")
    if not problem.images:
        return Drop(where, "no image", "the filter compares an image with its caption; give `images`")
    caption = problem.metadata.get("caption") or problem.response
    if not isinstance(caption, str) or not caption.strip():
        return Drop(where, "no caption", "`metadata` needs a `caption`: what the image shows, in words")
    return Row(problem, answer, letters, caption)


def settings(model: FilterModel, how: How, caption_chat: bool) -> dict[str, Any]:
    """What a model's journaled replies depend on besides the rows."""
    said = {"max_new_tokens": how.max_new_tokens, "downsample": how.downsample, "max_pixels": how.max_pixels}
    return {"job": "filter", **model.settings, **said, "caption_chat": caption_chat, "prompt": DIGEST}


def judge(
    rows: Sequence[Row],
    models: Sequence[FilterModel],
    open_journal: Callable[[FilterModel], Journal],
    caption_chat: bool = False,
) -> list[Judged | Drop]:
    """Asks every model about every row, one model after the other, the images first.

    Args:
      open_journal: gives a model's journal, of `settings`; what it has is not asked again. One with all replies does
        not load its model.
      caption_chat: whether the caption's text is a turn of a chat; else the model continues it as it is.

    Returns:
      One for each row, in their order; a Drop where a model gave no reply at all (a broken image, a refused prompt).

    Raises:
      InputError, RolloutError: a model can't be asked; what was answered is in its journal.
    """
    dropped: dict[str, Drop] = {}
    replies: dict[str, dict[str, dict[str, str]]] = {row.problem.id: {} for row in rows}
    for model in models:
        with open_journal(model) as journal:
            _ask_model(rows, model, journal, caption_chat, dropped)
            for row in rows:
                if row.problem.id not in dropped:
                    replies[row.problem.id][model.name] = {which: journal.done[row.key(which)] for which in PASSES}
    return [dropped.get(row.problem.id) or _judged(row, replies[row.problem.id]) for row in rows]


def _ask_model(
    rows: Sequence[Row], model: FilterModel, journal: Journal, caption_chat: bool, dropped: dict[str, Drop]
) -> None:
    with contextlib.ExitStack() as opened:
        loaded = False
        for which in PASSES:
            keys = {row.problem.id: row.key(which) for row in rows if row.problem.id not in dropped}
            todo = [row for row in rows if row.problem.id in keys and keys[row.problem.id] not in journal.done]
            if not todo:
                continue
            if not loaded:
                opened.enter_context(model)
                loaded = True
            with Progress(f"{model.name}, {which}", len(keys), len(keys) - len(todo)) as progress:

                def done(asked: Asked, reply: str | Drop, keys=keys, progress=progress) -> None:
                    if isinstance(reply, Drop):
                        dropped[asked.name] = reply
                    else:
                        journal.add(keys[asked.name], reply[:_LONGEST])
                    progress.advance("dropped" if isinstance(reply, Drop) else "")

                model.answer([row.asked(which, caption_chat) for row in todo], done)


def _judged(row: Row, replies: dict[str, dict[str, str]]) -> Judged:
    said, verdicts = {}, {}
    for name, texts in replies.items():
        found = {which: letter_in(texts[which], row.letters) for which in PASSES}
        said[name] = {**found, **{f"{which}_text": texts[which] for which in PASSES}}
        verdicts[name] = verdict(row.answer, found["image"], found["caption"])
    earlier = row.problem.metadata.get("filter")
    metadata = {**row.problem.metadata, "filter": {**(earlier if isinstance(earlier, dict) else {}), **said}}
    return Judged(dataclasses.replace(row.problem, metadata=metadata), row.answer, verdicts)


# ---------------------------------------------------------------------- what came of it


def counted(judged: Iterable[Judged], models: Sequence[FilterModel]) -> dict[str, dict[str, int]]:
    """Rows by verdict, for each model, and for "all" (the intersection, by the first model that drops a row)."""
    counts = {name: collections.Counter({KEPT: 0}) for name in [*(model.name for model in models), "all"]}
    for one in judged:
        counts["all"][one.reason] += 1
        for name, said in one.verdicts.items():
            counts[name][said] += 1
    return {name: {said: counts[name][said] for said in (KEPT, *REASONS) if said in counts[name]} for name in counts}


def by_pass(judged: Iterable[Judged], models: Sequence[FilterModel]) -> dict[str, dict[str, dict[str, int]]]:
    """Of each model and pass: how many rows it got right, got wrong, and gave no letter for."""
    words = ("right", "wrong", "no letter")
    counts = {model.name: {which: dict.fromkeys(words, 0) for which in PASSES} for model in models}
    for one in judged:
        for name in one.verdicts:
            for which in PASSES:
                letter = one.problem.metadata["filter"][name][which]
                counts[name][which][words[2] if letter is None else words[letter != one.answer]] += 1
    return counts


def show(counts: dict[str, dict[str, int]], console: Console | None = None) -> None:
    """The table of `counted`, on stderr."""
    table = Table(title="perception filter: rows", title_justify="left")
    table.add_column("")
    for name in counts:
        table.add_column(name, justify="right")
    for said in (KEPT, *REASONS):
        table.add_row(said, *(str(column.get(said, 0)) for column in counts.values()))
    (console or Console(stderr=True)).print(table)
