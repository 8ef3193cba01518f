"""A model that decides what rules can't: behind any OpenAI-compatible address, or Anthropic's.

Verdicts are kept in a journal under question, reply, gold, judge and prompts: an answer that changed is another one,
and what was asked is never asked again. An unreadable judge decides nothing, and is counted.
"""

from __future__ import annotations

import asyncio
import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from capcur_jax.errors import InputError
from capcur_jax.evaluation import judge_prompts
from capcur_jax.evaluation.benchmarks.base import Ask, Row
from capcur_jax.records.journal import Journal, key_of
from capcur_jax.rollout.chat import Chat, Failed, ask_all
from capcur_jax.rollout.dialects import ANTHROPIC, OPENAI, Dialect, Reply

ANTHROPIC_ADDRESS, ANTHROPIC_KEY = "https://api.anthropic.com", "ANTHROPIC_API_KEY"
OPTIONS = ("--judge", "--judge_key_variable")
FILE = "judge.jsonl"  # of a work directory


class Model(NamedTuple):
    """Which judge, and how it is asked.

    address: http(s)://HOST[:PORT], with or without /v1.
    dialect: the interface.
    key_variable: environment variable that holds the API key; "": none is sent.
    max_tokens: of a reply; twice as many after one that was cut off. A judge that thinks spends hundreds.
    tries: questions until a reply is readable; the later ones say what was missing.
    how: `Chat`'s further arguments.
    """

    address: str
    name: str
    dialect: Dialect = OPENAI
    key_variable: str = ""
    max_tokens: int = 2048
    tries: int = 3
    how: Mapping[str, Any] = MappingProxyType({})

    def chat(self) -> Chat:
        """Raises InputError: no address, or a variable that is not set."""
        return Chat(
            [self.address],
            self.name,
            key_variable=self.key_variable,
            dialect=self.dialect,
            options=OPTIONS,
            **self.how,
        )


def model_of(judge: str, name: str = "", key_variable: str = "") -> Model | None:
    """What `--judge`, `--judge_model` and `--judge_key_variable` mean.

    Args:
      judge: "none" | an OpenAI-compatible address | "anthropic" | "anthropic:" and another address of its interface.

    Raises:
      InputError: a judge without the name of its model.
    """
    if judge in ("", "none"):
        if name or key_variable:
            raise InputError("--judge_model needs a --judge: an address, or anthropic")
        return None
    if not name:
        raise InputError(f"--judge={judge} needs --judge_model: the name under which it is served")
    if judge == "anthropic":
        return Model(ANTHROPIC_ADDRESS, name, ANTHROPIC, key_variable or ANTHROPIC_KEY)
    if judge.startswith("anthropic:"):
        return Model(judge.removeprefix("anthropic:"), name, ANTHROPIC, key_variable)
    return Model(judge, name, OPENAI, key_variable)


class Question(NamedTuple):
    """What a judge is asked about one reply.

    name: for people, in the journal.
    content: all that the answer depends on besides the judge.
    messages: gives the conversation; called only where it is asked.
    read: the text of a reply -> a JSON value, or None where it is unreadable.
    again: what is said where it was.
    """

    name: str
    content: tuple[object, ...]
    messages: Callable[[], list[dict]]
    read: Callable[[str], Any]
    again: str


class Judge:
    """A judge with the journal of its answers. A context manager; one process at a time has a journal.

    Args:
      journal: the file.
      progress: told of every question that is done.

    Raises:
      InputError: the judge can't be asked at all, or another process has the journal.
    """

    def __init__(self, model: Model, journal: Path, progress: Callable[[int], None] = lambda count: None):
        self.model, self._progress = model, progress
        asyncio.run(model.chat().close())  # what the user has to mend is said before a model answers for hours
        self._journal = Journal(journal, {"job": "judge"})  # judges share it: their names are in the keys
        self.counts: collections.Counter[str] = collections.Counter()
        self.trouble = ""  # why the last question without an answer has none

    def decide(self, row: Row, text: str, ask: Ask) -> str | None:
        """See `decide_all`."""
        return self.decide_all([(row, text, ask)])[0]

    def decide_all(self, asks: Sequence[tuple[Row, str, Ask]]) -> list[str | None]:
        """The verdict on each (row, text of the reply, what is asked), None where the judge gave none.

        Returns:
          "letter": a letter of the row's options; "yes_no": "yes" or "no"; "equal": "same" or "different"; "extract":
          the answer. The first two and the last may be judge_prompts.NOTHING: the reply gives no answer, and is wrong.

        Raises:
          InputError, RolloutError: the judge is not there. The same command goes on from the journal.
        """
        return self.ask([_question(row, text, ask) for row, text, ask in asks])

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """What `read` gave of each, in their order; None where no reply was readable, or none came."""
        keys = [self._key(question) for question in questions]
        todo = {key: one for key, one in zip(keys, questions, strict=True) if key not in self._journal.done}
        self.counts["known"] += len(set(keys)) - len(todo)
        self._progress(len(keys) - len(todo))
        if todo:
            self.counts["calls"] += ask_all(self.model.chat, todo.items(), self._one, self._done)
        done = self._journal.done
        self.counts["unreadable"] += sum(key in done and done[key]["verdict"] is None for key in set(keys))
        return [done[key]["verdict"] if key in done else None for key in keys]

    def described(self) -> dict[str, Any]:
        """What a score that it took part in depends on, and under "spent" what it cost since this was opened."""
        return {
            "judge": self.model.name,
            "address": self.model.address,
            "prompts": judge_prompts.VERSION,
            "max_tokens": self.model.max_tokens,
            "temperature": 0.0,
            "tries": self.model.tries,
            "spent": self._spent(),
        }

    def _spent(self) -> dict[str, Any]:
        count = self.counts
        return {
            "questions": count["asked"] + count["known"] + count["no answer"],
            "from the journal": count["known"],
            "calls": count["calls"],
            "prompt_tokens": count["prompt tokens"],
            "tokens": count["tokens"],
            "replies without token counts": count["uncounted"],
            "unreadable": count["unreadable"],
            "no answer": count["no answer"],
            **({"trouble": self.trouble} if self.trouble else {}),
        }

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _key(self, question: Question) -> str:
        model = self.model
        return key_of(
            question.name,
            model.address,
            model.dialect.name,
            model.name,
            model.max_tokens,
            model.tries,
            *question.content,
        )

    async def _one(self, chat: Chat, item: tuple[str, Question]) -> Any:
        _, question = item
        try:
            messages, read, limit = question.messages(), None, self.model.max_tokens
        except (OSError, ValueError) as error:  # an image that can't be read
            raise Failed("broken image", str(error)[:300]) from None
        first = messages
        for _ in range(self.model.tries):
            reply = await chat.ask(messages, max_tokens=limit, temperature=0.0)
            self._count(reply)
            # A reply that was cut off has no last line: what stands there is a thought.
            read = question.read(reply.text) if reply.finish in ("stop", "") else None
            if read is not None:
                break
            if reply.finish == "length" or not reply.text.strip():  # its thought took them all
                limit = 2 * limit
            if said := reply.text.strip():  # an empty turn is refused by some servers
                turns = {"role": "assistant", "content": said}, {"role": "user", "content": question.again}
                messages = [*first, *turns]
        return read

    def _count(self, reply: Reply) -> None:
        self.counts["tokens"] += reply.tokens or 0
        self.counts["prompt tokens"] += reply.prompt_tokens or 0
        self.counts["uncounted"] += reply.tokens is None

    def _done(self, item: tuple[str, Question], result: Any) -> None:
        key, _ = item
        if isinstance(result, Failed):  # may be answered the next time: not in the journal
            self.counts["no answer"] += 1
            self.trouble = str(result)
        else:
            self._journal.add(key, {"verdict": result})
            self.counts["asked"] += 1
        self._progress(1)


def _question(row: Row, text: str, ask: Ask) -> Question:
    made = functools.cache(lambda: judge_prompts.prompt(row, text, ask))
    options = tuple(f"{letter}. {option}" for letter, option in row.options.items())
    content = (judge_prompts.VERSION, ask.kind, ask.question or row.question, ask.answer, text, row.gold, options)
    return Question(
        name=f"{row.index} {ask.kind}",
        content=content,
        messages=lambda: [{"role": "user", "content": made()}],
        read=lambda reply: judge_prompts.verdict(reply, row, ask),
        again=judge_prompts.again(row, ask),
    )
