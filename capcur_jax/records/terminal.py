"""What the commands of `python -m capcur_jax.data` show on stderr: progress, tables, histograms."""

from __future__ import annotations

import collections
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from capcur_jax.errors import InputError
from capcur_jax.records.tables import titled

_Item = TypeVar("_Item")
LINE_S = 15.0  # between lines about a long job, where there is no terminal
_BAR = 40  # characters of the longest bar


def stderr_console() -> Console:
    return Console(stderr=True, highlight=False)


def counted(items: Iterable[_Item], label: str) -> Iterator[_Item]:
    """Passes the items on; on a terminal a line counts them."""
    if not sys.stderr.isatty():
        yield from items
        return
    columns = (TextColumn("{task.description} {task.completed:,.0f}", markup=False), TimeElapsedColumn())
    with Bar(*columns, console=stderr_console(), transient=True) as progress:
        task = progress.add_task(label, total=None)
        for item in items:
            yield item
            progress.advance(task)


class Progress:
    """How far a long job is: a bar on a terminal, elsewhere a line now and then.

    A context manager; `advance` counts one item, under a word such as "rejected" if it is given one.

    Args:
      what: is done, such as "writing questions".
      total: items.
      done: items done before this run; they don't count for the speed.
      words: those shown even at 0.
    """

    def __init__(
        self, what: str, total: int, done: int = 0, words: tuple[str, ...] = (), console: Console | None = None
    ):
        self._console = console or stderr_console()
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


@contextlib.contextmanager
def files_explained() -> Iterator[None]:
    """A file that can't be opened or written ends the command with a line that names it."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise InputError(f"{name}{error.strerror or error}; mend that and start again") from None


def kept_and_dropped(summary: Mapping[str, Any], examples: Iterable[Sequence[str]] = ()) -> Group:
    """`Tally.summary`: rows that were read, that are kept, and that are left out by reason; (where, what) of some."""
    counts = [("read", summary["rows"]), ("kept", summary["kept"])]
    counts += [(f"dropped: {reason}", count) for reason, count in summary["dropped"].items()]
    rows, parts = list(examples), [titled("Rows", ("", "rows"), counts)]
    return Group(*parts, *([titled("Examples of dropped rows", ("where", "what"), rows)] if rows else []))


def bars(title: str, histogram: Mapping[str, Sequence[float]]) -> Group:
    """A histogram ({"edges": n + 1 numbers, "counts": n}) as a table with a bar for each bin."""
    edges, counts = histogram["edges"], histogram["counts"]
    most = max([*counts, 1])
    rows = [
        (f"{low:,.4g} - {high:,.4g}", count, "█" * max(bool(count), round(_BAR * count / most)))
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return titled(title, ("", "rows", ""), rows)
