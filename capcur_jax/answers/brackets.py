r"""Where brackets close. An escaped character (\{ is a printed brace, \\ a line break) is one mark, not two."""

import re

BRACES = (frozenset("{"), frozenset("}"))  # what opens and what closes: TeX's own, which group
ALL = (frozenset(["(", "[", "{", r"\{"]), frozenset([")", "]", "}", r"\}"]))  # every one that can be seen
_MARK = re.compile(r"\\.|[()\[\]{}]", re.DOTALL)


def closing(text: str, start: int, kinds: tuple[frozenset[str], frozenset[str]] = BRACES) -> re.Match | None:
    """The mark that closes what is open at `start`, in time linear in the text; None where none does. Kinds are not
    told apart: an interval's brackets differ."""
    opening, ending = kinds
    depth = 1
    for mark in _MARK.finditer(text, start):
        depth += (mark[0] in opening) - (mark[0] in ending)
        if not depth:
            return mark
    return None
