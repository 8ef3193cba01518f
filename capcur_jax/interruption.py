"""Ctrl-C and SIGTERM as a request that is honoured where nothing is lost, so that what was learned is saved."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Self


class Interrupted(Exception):
    """The user or the cluster asked the run to stop; raised at the next point where stopping loses nothing."""


_AGAIN_S = 0.3


class Interruption:
    """While entered, the first SIGINT or SIGTERM is remembered; a second one stops the process at once.

    Args:
      alone: whether this is the run's only process. Of several none may stop where the others go on.
    """

    def __init__(self, alone: bool = True):
        self._name, self._alone, self._now = "", alone, False
        self._before: dict[int, object] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._again)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraised
        return self

    def __exit__(self, *unused) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._name:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name
        # Python drops what is raised while it collects garbage, and libraries catch what they don't know: again, then.
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
        self._again(number, frame)

    def ask(self, reason: str) -> None:
        """As a signal would, where nothing is lost: the run itself has found a reason to stop."""
        self._name = self._name or reason

    def _again(self, number: int, frame: FrameType | None) -> None:
        if self._now:
            raise Interrupted(self._name)

    def _unraised(self, what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, Interrupted):
            self._hook(what)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Where nothing is lost: a signal raises Interrupted there and then. Of several processes `check` does it."""
        before, self._now = self._now, self._alone
        try:
            if self._now:
                self.check()
            yield
        finally:
            self._now = before

    def check(self, agree: Callable[[bool], bool] = bool) -> None:
        """Raises Interrupted if a signal came, to this process or (as `agree` finds out) to another one of the run."""
        if agree(bool(self._name)):
            raise Interrupted(self._name or "a signal to another process")
