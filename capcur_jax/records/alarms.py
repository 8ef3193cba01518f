"""Signs that a stage's training goes wrong, read from its step records. docs/training.md has the remedies.

Policies of this kind collapse without a word (verl #4818, #6382). Each alarm compares means over windows of steps, so
that no single step raises it, and is raised once a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 20  # steps

Record = Mapping[str, Any]


def _entropy_up(entropy: np.ndarray) -> str:
    first, last = entropy[:WINDOW].mean(), entropy[-WINDOW:].mean()
    return f"entropy {last:.2f} nats, {first:.2f} at the stage's start" if last > max(2 * first, first + 0.5) else ""


def _entropy_zero(entropy: np.ndarray) -> str:
    first, last = entropy[:WINDOW].mean(), entropy[-WINDOW:].mean()
    return f"entropy {last:.3f} nats, {first:.3f} at the stage's start" if last < min(0.02, first / 4) else ""


def _falling(values: np.ndarray, what: str, least: float) -> str:
    """Below the best window, by more than chance moves the means of two windows."""
    means = np.convolve(values, np.full(WINDOW, 1 / WINDOW), "valid")
    best, last = means.max(), means[-1]
    chance = 4 * np.sqrt(2 / WINDOW) * np.std(np.diff(values)) / np.sqrt(2)
    return f"{what} {last:.3f}, {best:.3f} in the best {WINDOW} steps" if best - last > max(least, chance) else ""


def _equal_groups(shares: np.ndarray) -> str:
    last = shares[-WINDOW:].mean()
    return f"{last:.0%} of the groups have equal rewards and teach nothing" if last > 0.8 else ""


def _truncated(shares: np.ndarray) -> str:
    first, last = shares[:WINDOW].mean(), shares[-WINDOW:].mean()
    told = f"{last:.0%} of the responses are cut off at the limit, {first:.0%} at the stage's start"
    return told if last > first + 0.15 else ""


def _difference(nats: np.ndarray) -> str:
    first, last = nats[:WINDOW].mean(), nats[-WINDOW:].mean()
    told = f"sampler's and trainer's log-probs differ by {last:.2g} nats, {first:.2g} at the stage's start"
    return told if last > max(0.02, 2 * first) else ""


# Name -> the key of the step records, the least steps, and what is told of the stage's values; "": nothing.
ALARMS: dict[str, tuple[str, int, Callable[[np.ndarray], str]]] = {
    "entropy_up": ("entropy", 2 * WINDOW, _entropy_up),
    "entropy_zero": ("entropy", 2 * WINDOW, _entropy_zero),
    "reward_falling": ("reward", 2 * WINDOW, lambda values: _falling(values, "reward", 0.1)),
    "accuracy_falling": ("accuracy", 2 * WINDOW, lambda values: _falling(values, "accuracy", 0.1)),
    "equal_groups": ("equal_groups", WINDOW, _equal_groups),
    "truncation": ("truncated", 2 * WINDOW, _truncated),
    "sampler_difference": ("logprob_difference_mean", 2 * WINDOW, _difference),
}


def raised(steps: Sequence[Record]) -> dict[str, str]:
    """What the last step raises: name of the alarm -> what is told. `steps`: records of the run, in order; those before
    the last have the `alarms` that they raised."""
    stage = steps[-1].get("stage")
    mine = [record for record in steps if record.get("stage") == stage]
    before = {name for record in mine for name in record.get("alarms", ())}
    found = {}
    for name, (key, least, told) in ALARMS.items():
        if name in before:
            continue
        values = np.array([record[key] for record in mine if record.get(key) is not None], float)
        values = values[np.isfinite(values)]
        if len(values) >= least and (text := told(values)):
            found[name] = text
    return found
