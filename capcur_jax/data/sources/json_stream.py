"""The elements of a JSON list one at a time, so that a file of any size takes the memory of one element.

A broken element costs itself alone as long as its brackets and quotes are balanced, else what follows it too. That is
why ijson (3.6) does not do: it raises at the first broken element and cannot go on behind it, and an element of 100,000
open brackets takes all memory.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from capcur_jax.data.problem import BadRow, short
from capcur_jax.errors import InputError

_PIECE = 1 << 20  # characters that are read at a time, at least
_LONGEST = 1 << 26  # characters of one element
# A whole text, a bracket, a comma, or the start of a text that doesn't end in the buffer.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{},"]', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")


def items(path: Path, key: str = "") -> Iterator[tuple[int, Any]]:
    """Numbers from 1 and elements of a file's list; where one isn't JSON, a BadRow in its place.

    Args:
      path: UTF-8. A byte that isn't becomes half a surrogate pair in the text that holds it.
      key: of the list in the file's object; a file that is a list itself is read as well.

    Raises:
      InputError: the file holds no such list, or is no whole gzip file.
    """
    try:
        yield from _items(path, key)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: no whole gzip file ({short(str(error), 80)}); write or download it again") from None


def _items(path: Path, key: str) -> Iterator[tuple[int, Any]]:
    how = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    with gzip.open(path, "rt", **how) if path.suffix.lower() == ".gz" else path.open(**how) as file:
        text = _Text(file)
        if not text.enter(key):
            wanted = f"a JSON list, or an object with one under {key!r}" if key else "a JSON list"
            raise InputError(f"{path}: not {wanted}; download the file again")
        number = 0
        while text.peek() != "]":
            number += 1
            try:
                value = text.value()
                text.end_element()
                yield number, value
            except BadRow as error:
                yield number, error
                if not text.skip_element():
                    return


class _Text:
    """A file's text in pieces; `position` is where reading goes on."""

    def __init__(self, file: TextIO):
        self._file, self._text, self.position = file, "", 0
        self._decode = json.JSONDecoder(parse_constant=_refuse).raw_decode

    def peek(self) -> str:
        """The next character that isn't white space, "" at the end."""
        while True:
            self.position = _SPACE.match(self._text, self.position).end()
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._more():
                return ""

    def enter(self, key: str) -> bool:
        """Goes behind the bracket that opens the list."""
        if self.peek() == "{" and key:
            self.position += 1
            if not self._find(key):
                return False
        if self.peek() != "[":
            return False
        self.position += 1
        return True

    def value(self) -> Any:
        """The next value. Raises BadRow, and stays where it is."""
        self.peek()
        while True:
            trouble = "it ends too early"
            try:
                value, end = self._decode(self._text, self.position)
                # A number that ends near the end of the buffer may go on in the file: 1, 1e+, 1e+5.
                if len(self._text) - end > 2 or not self._more():
                    self.position = end
                    return value
                continue
            except (ValueError, RecursionError) as error:
                trouble = str(error)
            if self._element_end() is not None or not self._more():
                raise BadRow("not JSON", f"not JSON ({short(trouble, 80)}); correct it or download the file again")

    def end_element(self) -> None:
        """Goes behind the comma, or before the bracket that ends the list. Raises BadRow."""
        after = self.peek()
        if after == ",":
            self.position += 1
        elif after != "]":
            what = f"{after!r} where a comma belongs" if after else "the file ends before its list"
            raise BadRow("not JSON", f"{what}; correct it or download the file again")

    def skip_element(self) -> bool:
        """Goes to the next element, whatever this one holds. Returns whether there can be one."""
        while (end := self._element_end()) is None:
            if not self._more():
                return False
        self.position = end + (self._text[end] != "]")
        return True

    def _find(self, key: str) -> bool:
        try:
            while self.peek() == '"':
                name = self.value()
                if self.peek() != ":":
                    return False
                self.position += 1
                if name == key:
                    return True
                self.value()
                if self.peek() == ",":
                    self.position += 1
        except BadRow:
            pass
        return False

    def _element_end(self) -> int | None:
        """Where the comma or bracket behind the element is, None where that isn't in the buffer."""
        depth = 0
        for token in _TOKEN.finditer(self._text, self.position):
            mark = token.group()
            if mark in ("]", "}", ",") and depth == 0:
                return token.start()
            if mark == '"':
                return None
            depth += (mark in ("[", "{")) - (mark in ("]", "}"))
        return None

    def _more(self) -> bool:
        """Reads on; the buffer then begins at `position`. Returns whether there was more, else nothing has changed.

        It doubles the rest, so that an element of any length is gone through a few times only.
        """
        rest = len(self._text) - self.position
        piece = self._file.read(max(_PIECE, rest)) if rest <= _LONGEST else ""
        if piece:
            self._text, self.position = self._text[self.position :] + piece, 0
        return bool(piece)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
