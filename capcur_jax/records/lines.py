"""A step record as lines of text: labels and numbers that are folded between each other only."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

Pieces = list[tuple[str, str]]  # labels and values

# Key of a step record, label, format. "%" formats show a share as percent.
_SAMPLED = (
    ("reward", "reward", ".3f"),
    ("accuracy", "accuracy", ".1%"),
    ("format", "format", ".0%"),
    ("response_length", "length", ".0f"),
    ("kl", "KL", ".4f"),
    ("entropy", "entropy", ".2f"),
)
_IMITATED = (("loss", "loss", ".4f"), ("token_accuracy", "token accuracy", ".1%"), ("grad_norm", "gradient", ".3g"))
_PHASES = ("data", "rollout", "reward", "update", "sync")


def learning(record: Mapping[str, Any]) -> Pieces:
    """What was learned in a step."""
    metrics = _SAMPLED if "reward" in record else _IMITATED
    return [(label, show(record, key, form)) for key, label, form in metrics if key in record]


def pace(record: Mapping[str, Any]) -> Pieces:
    """What a step took, and what went wrong in it."""
    pieces = [("step", _seconds(record, "seconds"))]
    pieces += [(phase, _seconds(record, f"seconds_{phase}")) for phase in _PHASES if f"seconds_{phase}" in record]
    if "tokens_per_second" in record:
        pieces.append(("tok/s", show(record, "tokens_per_second", ",.0f")))
    for key, label in (("compilations", "compilations"), ("skipped_updates", "skipped updates")):
        if record.get(key):
            pieces.append((label, f"{record[key]}"))
    if record.get("timed_out"):
        pieces.append(("without a verdict in time", show(record, "timed_out", ".1%")))
    return pieces


def sampling(health: Any) -> Pieces:
    """What the rollout engine is doing (rollout/engine.py's Health)."""
    pieces = [("rollout", f"{health.running:,} running"), ("", f"{health.queued:,} queued")]
    pieces += [("tok/s", f"{health.tokens_per_second:,.0f}"), ("weights", f"v{health.version}")]
    return [*pieces, ("servers", f"{health.alive}/{health.servers}")] if health.servers else pieces


def join(pieces: Sequence[tuple[str, str]]) -> Text:
    """One line: labels dim, values plain, two spaces between pieces."""
    text = Text()
    for index, (label, value) in enumerate(pieces):
        text.append("  " if index else "")
        text.append(f"{label} " if label else "", style="dim")
        text.append(value)
    return text


def wrap(pieces: Pieces, width: int) -> list[Text]:
    """Lines of at most `width`, folded between pieces only."""
    lines: list[Pieces] = [[]]
    for piece in pieces:
        if lines[-1] and len(join([*lines[-1], piece])) > width:
            lines.append([])
        lines[-1].append(piece)
    return [join(line) for line in lines]


def finite(record: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`, else None."""
    value = record.get(key)
    return float(value) if value is not None and math.isfinite(value) else None


def show(record: Mapping[str, Any], key: str, form: str, unit: str = "") -> str:
    """The formatted number under `key`, or "-"."""
    value = finite(record, key)
    return "-" if value is None else f"{value:{form}}{unit}"


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _seconds(record: Mapping[str, Any], key: str) -> str:
    """Three digits of seconds, so that the line of phases fits 80 columns."""
    value = finite(record, key)
    return "-" if value is None else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}s"
