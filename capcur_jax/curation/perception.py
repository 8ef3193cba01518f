"""Perception questions from captions (the paper's D_perc): a language model that sees the caption alone writes one.

It is asked for one four-way question on a fine detail or a spatial relation, as JSON in a fenced block. Its reply is
parsed strictly; one that can't be used goes back once with what is wrong. Options are then put in an order that
depends on the seed and the ids alone and makes A, B, C and D equally often right.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from capcur_jax.data.draw import drawn
from capcur_jax.data.problem import IMAGE_MARK, Drop, Problem, stable_hash
from capcur_jax.records.journal import Journal, key_of
from capcur_jax.records.terminal import Progress
from capcur_jax.rollout.chat import CONTROL_TOKEN, Chat, Failed, ask_all

LETTERS = "ABCD"
KINDS = ("detail", "relation")
QUESTION_LENGTHS = (8, 400)  # characters
OPTION_LENGTHS = (1, 120)

PROMPT = """\
Write one multiple-choice question that shows whether somebody has looked closely at a photo. You cannot see the \
photo; its description stands between the two lines of equals signs.

==========
{caption}
==========

- Ask about one fine detail (a colour, a number of things, a material, a pattern, written words, a state, something \
small) or about one spatial relation (what is left of, behind, between, on top of, or facing something). The \
description must say the answer outright.
- Who looks at the photo can answer; who only knows the world, or reads the question and its options, can not.
- Give four options of one kind and about one length. One is right; the other three are plausible, and wrong by the \
description.
- The question must be clear to somebody who has the photo and no description: do not mention a description or caption.
- The right option's words do not stand in the question. No option speaks of other options or of letters \
("none of the above", "both A and B").

Reply with one fenced block and nothing else:

```json
{{"question": "...", "options": {{"A": "...", "B": "...", "C": "...", "D": "..."}}, "answer": "...", "kind": "..."}}
```

"answer" is the letter of the right option; "kind" is "detail" or "relation".
"""
REPAIR = "This cannot be used: {detail}. Reply once more with one fenced block of JSON as described, and nothing else."
DIGEST = hashlib.sha256((PROMPT + REPAIR).encode()).hexdigest()[:12]  # a journal holds answers to these prompts only

_FENCE = re.compile(r"```[ \t]*(?:json)?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
_MAX_REPLY = 20_000
_LABELLED = re.compile(r"^\W*[A-D]\s*[.):]", re.IGNORECASE)
_LETTERS_ALONE = re.compile(r"^\W*[A-D](?:\W+(?:(?:and|or|nor)\W+)?[A-D])*\W*$", re.IGNORECASE)
_LETTER_NAMED = re.compile(r"\b(?i:both|either|neither|options?|choices?|answers?|letters?)\W{1,3}[A-D]\b")
_OF_OPTIONS = re.compile(
    r"\b(?:all|none|any|both|neither|either|some|two|three|more than one)\s+of\s+(?:the\s+|these\s+)?"
    r"(?:above|below|options?|choices?|answers?|others?)\b"
    r"|^\W*(?:(?:all|none|any|both|neither|either) of (?:these|those|them)|neither|both)\W*$"
    r"|^\W*(?:(?:it )?(?:can ?not|can't) be (?:determined|told|seen|known)|unknown)\W*$"
    r"|^\W*not (?:mentioned|stated|specified)\W*$",
    re.IGNORECASE,
)
_WORD = re.compile(r"[-+−$€£#]?\d[\w.,:/]*[%°]?|[^\W_]+")
_SPEAKS_OF_CAPTION = re.compile(r"\b(?:captions?|descriptions?|passage)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Question:
    """One that the parser accepted; the options in the writer's order."""

    question: str
    options: tuple[str, str, str, str]
    right: int  # index of the right one
    kind: str = ""  # one of KINDS; "": the writer didn't say


class BadQuestion(ValueError):
    """A reply that is no usable question: `reason` is counted, `detail` tells the writer what to mend."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# ---------------------------------------------------------------------- parsing


def parse(text: str, cut_off: bool = False) -> Question:
    """The question in a reply. Raises BadQuestion for anything but exactly what was asked for.

    Args:
      cut_off: the reply ended at the limit of tokens.
    """
    text = text.rpartition("</think>")[2]
    if len(text) > _MAX_REPLY:
        raise BadQuestion("reply too long", f"the reply has more than {_MAX_REPLY} characters")
    blocks = _FENCE.findall(text)
    if len(blocks) != 1:
        if cut_off:
            raise BadQuestion("reply cut off", "the reply was cut off before its end; it must be much shorter")
        reason = "several fenced blocks" if blocks else "no fenced block"
        raise BadQuestion(
            reason, f"the reply has {len(blocks)} fenced blocks that begin with ```json; give exactly one"
        )
    row = _loaded(blocks[0])
    if not isinstance(row, dict) or set(row) - {"kind"} != {"question", "options", "answer"}:
        raise BadQuestion(
            "wrong keys", 'the JSON must be an object with the keys "question", "options", "answer", "kind"'
        )
    if not isinstance(row["options"], dict) or set(row["options"]) != set(LETTERS):
        raise BadQuestion("not four options", '"options" must be an object with exactly the keys "A", "B", "C", "D"')
    question = _line(row["question"], "question", QUESTION_LENGTHS)
    options = tuple(_line(row["options"][letter], f"option {letter}", OPTION_LENGTHS) for letter in LETTERS)
    if not isinstance(row["answer"], str) or row["answer"] not in tuple(LETTERS):
        raise BadQuestion("answer is no letter", '"answer" must be one letter, "A", "B", "C" or "D"')
    kind = row.get("kind", "")
    if not isinstance(kind, str) or kind not in ("", *KINDS):
        raise BadQuestion("unknown kind", '"kind" must be "detail" or "relation"')
    right = LETTERS.index(row["answer"])
    _check(question, options, right)
    return Question(question, options, right, kind)


def _loaded(block: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        return json.loads(block, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise BadQuestion("not JSON", f"the fenced block is no JSON ({str(error)[:100]})") from None


def _line(value: Any, name: str, lengths: tuple[int, int]) -> str:
    """A text on one line, of a length within the bounds."""
    if not isinstance(value, str):
        raise BadQuestion("not a text", f"the {name} must be a text")
    text = " ".join(value.split())
    if not lengths[0] <= len(text) <= lengths[1]:
        reason = "text too short" if len(text) < lengths[0] else "text too long"
        raise BadQuestion(reason, f"the {name} must have {lengths[0]} to {lengths[1]} characters, not {len(text)}")
    # Marks of images and tokens of chat templates would become some in a prompt; controls and surrogates are no text.
    if (
        IMAGE_MARK in text
        or re.search(r"<\|.*?\|>", text)
        or any(unicodedata.category(c) in ("Cc", "Cs") for c in text)
    ):
        raise BadQuestion(
            "unusable characters", f"the {name} holds control characters, an {IMAGE_MARK} mark or a <|token|>"
        )
    return text


def _check(question: str, options: Sequence[str], right: int) -> None:
    """Raises BadQuestion where the texts don't go together."""
    if any(_LABELLED.search(option) or _LETTERS_ALONE.search(option) for option in options):
        raise BadQuestion(
            "option is a letter", "an option begins with a letter of an option, or is one; give its text alone"
        )
    named = any(_LETTER_NAMED.search(text) for text in (question, *options))
    if named or any(_OF_OPTIONS.search(option) for option in options):
        raise BadQuestion(
            "option about options", "an option speaks of other options or is no answer; give four answers"
        )
    plain = [_plain(option) for option in options]
    if len(set(plain)) < 4:
        raise BadQuestion("options alike", "two options say the same; give four different ones")
    asked = f" {_plain(question)} "
    inside = [f" {option} " in asked for option in plain]
    if inside[right] and not all(inside):
        raise BadQuestion("question gives the answer away", "the words of the right option stand in the question")
    if _SPEAKS_OF_CAPTION.search(question):
        raise BadQuestion(
            "question about the caption", "the question mentions a caption or description; ask of the photo"
        )


def _plain(text: str) -> str:
    """To compare: no case, no punctuation but numbers', no article in front; the text itself if nothing is left."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = [word.rstrip(".,:/") for word in _WORD.findall(folded)]
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words) or folded


# ---------------------------------------------------------------------- order of the options


def right_letters(count: int, seed: int) -> Iterator[str]:
    """Letters of right answers: over every prefix each letter comes equally often, or once more than another."""
    for block in range(-(-count // 4)):
        letters = list(LETTERS)
        random.Random(stable_hash("letters", seed, block)).shuffle(letters)
        yield from letters[: count - 4 * block]


def arranged(question: Question, letter: str, seed: int, name: str) -> tuple[str, ...]:
    """The options with the right one at `letter`, the others shuffled by the seed and the row's id."""
    others = [option for i, option in enumerate(question.options) if i != question.right]
    random.Random(stable_hash("options", seed, name)).shuffle(others)
    others.insert(LETTERS.index(letter), question.options[question.right])
    return tuple(others)


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """The text of a problem: an image, the question, and a line for each option."""
    return "\n".join([IMAGE_MARK + question, *(f"{letter}. {o}" for letter, o in zip(LETTERS, options, strict=True))])


# ---------------------------------------------------------------------- the way from captions to problems


@dataclasses.dataclass
class Counts:
    """What `synthesize` did besides what its rows say."""

    asked: int = 0  # replies in this run, repairs included
    requests: int = 0  # requests for them, those that came to nothing included
    repaired: int = 0  # rows that the second reply made usable, of all runs
    letters: collections.Counter[str] = dataclasses.field(
        default_factory=lambda: collections.Counter(dict.fromkeys(LETTERS, 0))
    )


def settings(model: str, temperature: float, max_tokens: int) -> dict[str, Any]:
    """What the journal's replies depend on besides the captions."""
    return {"job": "synthesize", "model": model, "temperature": temperature, "max_tokens": max_tokens, "prompt": DIGEST}


def synthesize(
    rows: Iterable[Problem | Drop],
    journal: Journal,
    chat: Callable[[], Chat],
    *,
    file: str | os.PathLike,
    model: str,
    temperature: float = 0.0,
    max_tokens: int = 512,
    limit: int = 0,
    seed: int = 0,
    counts: Counts | None = None,
) -> Iterator[Problem | Drop]:
    """Perception problems from caption rows (`response`: the caption, one image), in the order of their ids.

    Args:
      journal: of `settings`; what it has is not asked again.
      chat: opens the writer.
      file: that the rows come from.
      limit: of usable captions, 0: all; see data/draw.py.
      seed: of the options' order.
      counts: is filled.

    Yields:
      A Drop for each row that can't be used and each caption without a usable question, then the problems.

    Raises:
      InputError, RolloutError: no server answers; what was answered is in the journal.
    """
    counts = Counts() if counts is None else counts
    captions: list[Problem] = []
    for row in rows:
        drop = row if isinstance(row, Drop) else _unusable(row)
        if drop:
            yield drop
        else:
            captions.append(row)
    captions = drawn(captions, limit, file)

    failed: dict[str, Failed] = {}
    _ask(captions, journal, chat, failed, counts, temperature, max_tokens)

    good: list[tuple[Problem, Question, bool]] = []
    for caption in captions:
        replies = journal.done.get(_key(caption), [])
        if caption.id in failed:
            yield Drop(f"row {caption.id}", failed[caption.id].reason, failed[caption.id].detail)
            continue
        try:
            good.append((caption, parse(**_said(replies[-1])), len(replies) > 1))
        except BadQuestion as error:
            yield Drop(f"row {caption.id}", error.reason, f"the writer's last reply: {error.detail}")
    good.sort(key=lambda one: one[0].id)
    counts.repaired = sum(repaired for *_, repaired in good)
    for (caption, question, repaired), letter in zip(good, right_letters(len(good), seed), strict=True):
        counts.letters[letter] += 1
        yield _problem(caption, question, letter, seed, {"writer": model} | ({"repaired": True} if repaired else {}))


def _ask(captions, journal, chat, failed, counts, temperature, max_tokens) -> None:
    """Fills the journal: under each caption's key the replies about it, one or two."""
    open_ones = [caption for caption in captions if not _settled(journal.done.get(_key(caption), []))]

    async def ask(client: Chat, caption: Problem) -> None:
        key = _key(caption)
        while not _settled(replies := journal.done.get(key, [])):
            reply = await client.ask(_messages(caption, replies), max_tokens=max_tokens, temperature=temperature)
            counts.asked += 1
            journal.add(key, [*replies, {"text": reply.text[: _MAX_REPLY + 1], "finish": reply.finish[:20]}])

    def done(caption: Problem, result: Failed | None) -> None:
        if result:
            failed[caption.id] = result
        progress.advance("" if not result and _has_question(journal.done[_key(caption)]) else "rejected")

    if open_ones:
        total = len(captions)
        with Progress("writing questions", total, total - len(open_ones), words=("rejected",)) as progress:
            counts.requests = ask_all(chat, open_ones, ask, done)


def _unusable(caption: Problem) -> Drop | None:
    where = f"row {caption.id}"
    if caption.response is None or not caption.response.strip():
        return Drop(where, "no caption", "`response` holds no caption; build the set from a source of captions")
    if len(caption.images) != 1:
        return Drop(where, "not one image", f"the row has {len(caption.images)} images; a caption describes one")
    if token := CONTROL_TOKEN.search(caption.response):
        detail = f"the caption holds {token[0]}, which a server takes for a token of its own; take it out"
        return Drop(where, "unusable prompt", detail)
    return None


def _key(caption: Problem) -> str:
    return key_of(caption.id, caption.response)


def _messages(caption: Problem, replies: Sequence[dict]) -> list[dict]:
    messages = [{"role": "user", "content": PROMPT.format(caption=caption.response.strip())}]
    for reply in replies:
        try:
            parse(**_said(reply))
        except BadQuestion as error:
            said = CONTROL_TOKEN.sub("(a token)", reply["text"][:4000])  # of the server's, it would end the turn
            messages.append({"role": "assistant", "content": said or "(nothing)"})
            messages.append({"role": "user", "content": REPAIR.format(detail=error.detail)})
    return messages


def _said(reply: dict) -> dict[str, Any]:
    return {"text": reply["text"], "cut_off": reply["finish"] == "length"}


def _has_question(replies: Sequence[dict]) -> bool:
    try:
        return bool(replies) and bool(parse(**_said(replies[-1])))
    except BadQuestion:
        return False


def _settled(replies: Sequence[dict]) -> bool:
    return len(replies) >= 2 or _has_question(replies)


def _problem(caption: Problem, question: Question, letter: str, seed: int, more: dict[str, Any]) -> Problem:
    options = arranged(question, letter, seed, caption.id)
    known = {
        "caption": caption.response,
        "image_id": str(caption.metadata.get("image_id") or Path(caption.images[0]).stem),
        "question": question.question,
        "options": list(options),
    }
    return Problem(
        id=caption.id,
        problem=multiple_choice(question.question, options),
        answer=letter,
        images=caption.images,
        capability="perception",
        kind=question.kind,
        answer_type="letter",
        source=caption.source,
        metadata={**caption.metadata, **known, **more},
    )
