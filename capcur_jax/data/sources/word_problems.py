"""Capability "text": one-step word problems (add, subtract, multiply) without an image, made from templates.

The numbers of a problem name its split, so a sum that is asked in one split is asked in no other, whatever the wording:
a right answer to a test question was computed, not remembered. Everything is picked by hash, so a set comes out the
same on every machine.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from capcur_jax.data.built import build_set
from capcur_jax.data.problem import Problem, even_shares, stable_hash

VERSION = "word-problems-3"  # raise it with every change of the rows
KINDS = ("add", "subtract", "multiply")
COUNTS = {"train": 9600, "validation": 300, "test": 1000}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Of the operands a and b; of two numbers, the smaller is subtracted from the larger.
OPERANDS = {
    "add": (range(11, 80), range(11, 80)),
    "subtract": (range(11, 100), range(11, 100)),
    "multiply": (range(11, 50), range(2, 10)),
}
NAMES = _words("Ada Amir Ben Chen Dana Elif Finn Gita Hugo Ines Jun Kofi Lena Maya Nico Omar Pia Rosa Sam Tess")
OBJECTS = _words("apples balls beads books cards coins cups eggs keys nuts pens pins plums shells stamps tiles")
# {name} and {other} are two people, {a} and {b} the operands in the order in which the solution writes them.
WORDINGS = {
    "add": (
        "{name} has {a} {objects} and gets {b} more. How many now?",
        "{name} has {a} {objects}. {other} has {b}. How many together?",
        "There are {a} {objects}. {name} adds {b}. How many are there now?",
        "{name} buys {a} {objects} and then {b} more. How many in all?",
    ),
    "subtract": (
        "{name} has {a} {objects} and gives away {b}. How many are left?",
        "{name} had {a} {objects} and lost {b}. How many are left?",
        "There are {a} {objects}. {name} takes {b}. How many are left?",
        "{name} has {a} {objects}. {other} has {b}. How many more has {name}?",
    ),
    "multiply": (
        "{name} has {a} bags. Each holds {b} {objects}. How many in all?",
        "{name} buys {a} {objects}. Each costs {b} coins. How much is that?",
        "For {a} days {name} gets {b} {objects} a day. How many in all?",
        "{name} gives {a} friends {b} {objects} each. How many in all?",
    ),
}


def build(directory: str | os.PathLike, capability: str = "text") -> dict[str, Path]:
    """Gives the files of the three splits below `directory`, building them on first use (about a second).

    Raises:
      ValueError: another capability than "text".
    """
    if capability != "text":
        raise ValueError(f"word_problems has no capability {capability!r}; use 'text'")

    def make() -> dict[str, list[Problem]]:
        return {split: [p for p, _ in questions(split, "text", count)] for split, count in COUNTS.items()}

    return build_set(directory, "text", VERSION, make)


def questions(split: str, salt: str, count: int) -> list[tuple[Problem, dict]]:
    """`count` distinct questions of a split with their facts, the kinds taking turns.

    Another `salt` draws other texts of the same split; it starts the ids.
    """
    shares = even_shares(count, KINDS)
    by_kind = [_of_kind(split, salt, kind, shares[kind]) for kind in KINDS]
    return [row for turn in itertools.zip_longest(*by_kind) for row in turn if row is not None]


def worked(kind: str, facts: dict) -> tuple[str, str]:
    """(reasoning, answer) of a question: tens and ones apart, then together.

    Args:
      facts: {"a": int, "b": int}, the operands.
    """
    a, b = facts["a"], facts["b"]
    (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
    if kind == "add":
        sign, tens, ones = "+", 10 * (tens_a + tens_b), ones_a + ones_b
    elif kind == "subtract":
        sign, tens, ones = "-", 10 * (tens_a - tens_b), ones_a - ones_b
    elif kind == "multiply":
        sign, tens, ones = "x", 10 * tens_a * b, ones_a * b
    else:
        raise ValueError(f"no kind {kind!r} of word problem; one of {', '.join(KINDS)}")
    return f"{a} {sign} {b} = {tens} {'-' if ones < 0 else '+'} {abs(ones)} = {tens + ones}.", str(tens + ones)


def split_of(kind: str, a: int, b: int) -> str:
    """The split that a pair of operands belongs to: 10 % test, 5 % validation, the rest train. The order of what is
    added or multiplied makes no other pair."""
    pair = (a, b) if kind == "subtract" else (min(a, b), max(a, b))
    percent = stable_hash("word problem split", kind, *pair) % 100
    return "test" if percent < 10 else "validation" if percent < 15 else "train"


def _of_kind(split: str, salt: str, kind: str, count: int) -> list[tuple[Problem, dict]]:
    rows: dict[str, tuple[Problem, dict]] = {}  # by text
    for number in itertools.count():
        if len(rows) == count:
            break
        text, facts = _draw(kind, f"{salt}-{number}")
        if split_of(kind, facts["a"], facts["b"]) == split and text not in rows:
            row_id = f"{salt}-{split}-{kind}-{number}"
            rows[text] = (Problem(row_id, text, worked(kind, facts)[1], capability="text", kind=kind), facts)
    return list(rows.values())


def _draw(kind: str, key: str) -> tuple[str, dict]:
    """The text and operands that a key names."""

    def pick(what: str, options):
        return options[stable_hash(key, kind, what) % len(options)]

    a, b = (pick(operand, options) for operand, options in zip("ab", OPERANDS[kind], strict=True))
    if kind == "subtract":
        a, b = max(a, b), min(a, b)
    name = pick("name", NAMES)
    other = pick("other", [n for n in NAMES if n != name])
    text = pick("wording", WORDINGS[kind]).format(name=name, other=other, objects=pick("objects", OBJECTS), a=a, b=b)
    return text, {"a": a, "b": b}
