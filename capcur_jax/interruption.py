"""Ctrl-C and SIGTERM as a request that is honoured between steps, so that what was learned is saved."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Self


class Interrupted(Exception):
    """The user or the cluster asked the run to stop; raised at the next point where stopping loses nothing."""


class Interruption:
    """While entered, the first SIGINT or SIGTERM is remembered; a second one stops the process at once."""

    def __init__(self):
        self._name = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *unused) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._name:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name

    def check(self, agree: Callable[[bool], bool] = bool) -> None:
        """Raises Interrupted if a signal came, to this process or (as `agree` finds out) to another one of the run."""
        if agree(bool(self._name)):
            raise Interrupted(self._name or "a signal to another process")
