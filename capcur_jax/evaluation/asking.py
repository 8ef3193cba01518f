"""Rows of a benchmark on their way to a model and back: how they are asked, and what is kept of the replies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from capcur_jax.data.problem import IMAGE_MARK
from capcur_jax.data.prompts import INSTRUCTION
from capcur_jax.evaluation.benchmarks.base import Benchmark, Reply, Row
from capcur_jax.records.journal import Journal, digest_of, key_of
from capcur_jax.rollout.engine import Sampling


class Asked(NamedTuple):
    """A row as a model gets it: never its gold."""

    index: str
    parts: tuple[str | Path, ...]  # of the user's turn: texts, and files of images where they stand
    system: str = ""  # the system turn; "": none

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(str(part) for part in self.parts if isinstance(part, Path))

    @property
    def key(self) -> str:
        """Of the journal: another text, image or system turn is another question. The images are read."""
        parts = [f"image {digest_of(str(part))}" if isinstance(part, Path) else part for part in self.parts]
        return key_of(self.index, self.system, *parts)


class Said(NamedTuple):
    """What came back."""

    text: str
    finish: str = ""  # "stop" | "length" (cut off at the limit) | the server's own word
    tokens: int | None = None  # end token included, where the engine counts it; None: not known
    thinking: str = ""  # what a server keeps apart from the text
    failed: str = ""  # why there is no reply; such a row is asked again by the next command

    def reply(self) -> Reply:
        return Reply(self.text, self.finish, self.tokens, failed=self.failed)


# Gets replies as they come, several at once. Of several processes that of process 0 gets all.
Done = Callable[[Sequence[tuple[Asked, Said]]], None]


class Answerer(Protocol):
    """A model that can be asked. A context manager: it holds memory only inside.

    settings: what its answers depend on besides the questions, as JSON values.
    """

    settings: dict[str, Any]

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: Any) -> None: ...

    def prepare(self, questions: Iterable[Asked]) -> None:
        """Called once, with all questions of the command that follow: what is compiled depends on their sizes."""

    def answer(self, questions: Sequence[Asked], wanted: Sequence[bool], done: Done) -> None:
        """Asks those of a benchmark's questions that are wanted. Of several processes all call it together.

        Raises:
          InputError, RolloutError: no more can be asked; what was answered is done.
        """


def turn(text: str, images: Sequence[Path]) -> tuple[str | Path, ...]:
    """The user's turn: the images first, then the text. Marks in the text are the places of the last images, as in
    training; more marks than there are images are text."""
    pieces = text.split(IMAGE_MARK)
    marks = len(pieces) - 1
    if marks > len(images):
        return (*images, text)
    first = len(images) - marks
    parts: list[str | Path] = [*images[:first], pieces[0]]
    for image, piece in zip(images[first:], pieces[1:], strict=True):
        parts += [image, piece]
    return tuple(part for part in parts if part != "")


def asked(benchmark: Benchmark, row: Row, instruction: str) -> Asked:
    """The row's question; `instruction`: where the training's stands, see prompts.PLACEMENTS."""
    parts = turn(benchmark.put(row), row.images)
    if instruction == "suffix":
        last = parts[-1] if parts else ""
        parts = (*parts[:-1], f"{last} {INSTRUCTION}") if isinstance(last, str) and last else (*parts, INSTRUCTION)
    return Asked(row.index, parts, INSTRUCTION if instruction == "system" else "")


class Replies:
    """The replies to a benchmark's questions: the journal of those that are known. A context manager.

    Args:
      path: the journal.
      settings: of the journal; see `Journal`.
      questions: all of them, in the rows' order.

    Attributes:
      failed: index -> why there is no reply, of this command.

    Raises:
      InputError: the journal holds replies of other settings, which it names.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], questions: Sequence[Asked]):
        self.questions = questions
        self.failed: dict[str, str] = {}
        self._keys = [question.key for question in questions]
        self._of = {question.index: key for question, key in zip(questions, self._keys, strict=True)}
        self._journal = Journal(path, settings, option="--workdir")

    def wanted(self) -> list[bool]:
        """Which questions have no reply yet."""
        return [key not in self._journal.done for key in self._keys]

    def add(self, answers: Sequence[tuple[Asked, Said]]) -> None:
        """Keeps them; those that failed are told apart, and are wanted again."""
        self.failed.update({question.index: said.failed for question, said in answers if said.failed})
        good = [(question, said) for question, said in answers if not said.failed]
        self._journal.add_all(
            (
                self._of[question.index],
                {name: value for name, value in said._asdict().items() if value or name == "text"},
            )
            for question, said in good
        )
        for question, _ in good:
            self.failed.pop(question.index, None)

    def said(self) -> list[Said]:
        """Of all questions, in their order."""
        done = self._journal.done
        return [
            Said(**done[key]) if key in done else Said("", failed=self.failed.get(question.index, "not asked yet"))
            for question, key in zip(self.questions, self._keys, strict=True)
        ]

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, *_) -> None:
        self._journal.close()


def sampled(sampling: Sampling, instruction: str) -> dict[str, Any]:
    """How questions are put and answered, as settings of a journal and conditions of a score."""
    return {
        "instruction": instruction,
        "instruction_text": "" if instruction == "none" else INSTRUCTION,
        **{name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")},
    }
