"""Which rows are taken where not all are: by the hash of their ids, never a file's first, which are of one source or
kind where the file is sorted."""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Sequence
from pathlib import Path

from capcur_jax.data.problem import Problem, stable_hash
from capcur_jax.data.row_files import stem


def drawn(problems: Sequence[Problem], count: int, file: str | os.PathLike) -> list[Problem]:
    """`count` of a file's problems, 0: all, in the order of their hashes.

    The order of the rows changes nothing, and more of them contain fewer. A row that has no id of its own is called by
    its line (rows.py), which says nothing of it: what is hashed then is its text, answer and the names of its images.
    """
    by_line = re.compile(rf"{re.escape(stem(Path(file)))}-\d+").fullmatch

    def key(problem: Problem) -> int:
        if by_line(problem.id):
            return stable_hash("drawn", problem.problem, problem.answer, *map(os.path.basename, problem.images))
        return stable_hash("drawn", problem.id)

    return sorted(problems, key=key)[: count or None]


def shares(problems: Sequence[Problem]) -> dict[str, dict[str, float]]:
    """The share of each kind and of each source, largest first; {} where no row names one."""
    found = {}
    for name, values in (("kinds", [p.kind for p in problems]), ("sources", [p.source for p in problems])):
        counts = sorted(collections.Counter(values).items(), key=lambda item: (-item[1], item[0]))
        found[name] = {value or "none": count / len(problems) for value, count in counts} if any(values) else {}
    return found
