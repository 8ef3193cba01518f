"""How far a long job is, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import collections
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_S = 15.0


class Progress:
    """A context manager; `advance` counts one item, under a word such as "rejected" if it is given one.

    Args:
      what: is done, such as "writing questions".
      total: items.
      done: of them before this run; they don't count for the speed.
      words: that are shown even at 0.
    """

    def __init__(
        self, what: str, total: int, done: int = 0, words: tuple[str, ...] = (), console: Console | None = None
    ):
        self._console = console or Console(stderr=True, highlight=False)
        self._what, self._total, self._first, self._done = what, total, done, done
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(words, 0))
        self._started = self._said = time.monotonic()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}")
        self._bar = Bar(*columns, TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(what, total=total, completed=done, said="")

    def advance(self, word: str = "") -> None:
        self._done += 1
        if word:
            self.counts[word] += 1
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, said=self._words())
        elif time.monotonic() - self._said >= LINE_S:
            self._line()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()
        if not self._console.is_terminal:
            self._line()

    def _line(self) -> None:
        self._said = time.monotonic()
        # Not wrapped: one line of a log.
        self._console.print(
            f"{self._what}: {self._done} of {self._total}, {self._words()}", soft_wrap=True, markup=False
        )

    def _words(self) -> str:
        rate = (self._done - self._first) / max(time.monotonic() - self._started, 1e-9)
        return ", ".join([*(f"{count} {word}" for word, count in self.counts.items()), f"{rate:.1f}/s"])
