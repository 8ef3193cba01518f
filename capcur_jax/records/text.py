"""Text and numbers of records as people may see them, on a terminal and in HTML: nothing hidden, nothing infinite."""

import math
import re
from collections.abc import Mapping
from typing import Any

# Control characters, line separators, text-direction overrides, zero-width spaces and half surrogate pairs.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff0-\ufffb\ufffe\uffff]"
)


def visible(text: str) -> str:
    """Invisible characters as escapes: they could hide text, turn its direction or steer a terminal."""
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: Any, form: str, unit: str = "") -> str:
    """The formatted number, or "" where there is none."""
    return f"{value:{form}}{unit}" if is_number(value) else ""


def moment_title(moment: str) -> str:
    """How a moment of an evaluation is called."""
    return moment.replace("after_", "after ", 1)


def moments_of(accuracy: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Moment -> its title: the base first, the end last. `accuracy`: capability -> moment -> share."""
    moments = dict.fromkeys(moment for values in accuracy.values() for moment in values)
    order = sorted(moments, key=lambda moment: (moment == "final") - (moment == "base"))
    return {moment: moment_title(moment) for moment in order}


def counted(counts: Any) -> str:
    """The counts that are not 0, for people: "3 rows, 1 images"; "" of what is no mapping."""
    return (
        ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) if isinstance(counts, Mapping) else ""
    )
