"""Standard output and error of the commands, whatever they lead to."""

from __future__ import annotations

import os
import sys
from typing import Any


def prepare() -> None:
    """Characters that a terminal's encoding lacks are shown by their codes. Where a pipe is closed (`| head`), the work
    goes on and nothing more is said."""
    sys.stdout, sys.stderr = _Stream(sys.stdout), _Stream(sys.stderr)


class _Stream:
    """A text stream that neither an encoding nor a closed pipe makes fail."""

    def __init__(self, stream: Any):
        stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._nowhere(len(text))

    def flush(self) -> None:
        """As the stream's."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._nowhere(0)

    def _nowhere(self, written: int) -> int:
        # Python flushes what is left in the buffer once more, when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        return written
