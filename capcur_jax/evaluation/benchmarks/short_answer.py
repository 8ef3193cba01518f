"""The short answer in a reply to DynaMath, as its two scorers look for it; what they read as a number."""

from __future__ import annotations

import json
import math
from typing import Any


def official(text: str) -> str | None:
    """What stands under "short answer", as text; None where the reply is JSON of another kind.

    Without JSON it is the last line less its last character, as the scorer has it.
    """
    text = _braced(text)
    try:
        found = json.loads(text, strict=False)
        return str(found.get("short answer")) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return text.rpartition("\n")[2][:-1]


def kit(text: str, kind: str) -> str | None:
    """The answer under "short answer" if it is a text and of its kind, else the whole reply if that is; else None."""
    text = _braced(text).replace("\\", "")
    try:
        found = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        found = None
    answer: Any = found.get("short answer") if isinstance(found, dict) else None
    read = of_kind(answer, kind) if isinstance(answer, str) else None
    return of_kind(text, kind) if read is None else read


def of_kind(text: str, kind: str) -> str | None:
    """A text that is a number; the one letter of A to E that a text has; any text. None where it is not of its kind."""
    if kind == "text":
        return text or None  # nothing is contained in any answer: no credit for it
    if kind == "float":
        try:
            return text if number(text) is not None else None
        except ValueError:
            return None
    letters = [text.upper()] if len(text) == 1 else [letter for letter in "ABCDE" if letter in text.upper()]
    return letters[0] if len(letters) == 1 else None


def number(text: str) -> float:
    """ "2π" is one, as is what comes before a first blank; "π" and "1/2" are none. Raises ValueError."""
    head, pi, _ = (text if text.isdigit() else text.split(" ")[0]).partition("π")
    return float(head) * (math.pi if pi else 1)


def near(text: str, gold: str) -> bool:
    """Whether a text is a number no further than 0.001 from the right one."""
    try:
        return abs(number(text) - float(gold)) <= 0.001
    except ValueError:
        return False


def _braced(text: str) -> str:
    """From the first "{" to the last "}" without backslashes, which is where both look for JSON; else all of it."""
    start, end = text.find("{"), text.rfind("}")
    return text[start : end + 1].replace("\\", "") if 0 <= start < end else text
