"""Which rows of which benchmarks a command asks, and what their scores say of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from capcur_jax.data.draw import drawn
from capcur_jax.data.problem import Problem, stable_hash
from capcur_jax.data.sets import Sets
from capcur_jax.errors import InputError
from capcur_jax.evaluation import tables
from capcur_jax.evaluation.benchmarks import capability, registry
from capcur_jax.evaluation.benchmarks.base import Benchmark, Row


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A benchmark's rows that are asked. conditions: of its score."""

    benchmark: Benchmark
    rows: Sequence[Row]
    conditions: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where benchmarks come from.

    data: --data, a file or folder; None: none was given.
    unpacked: folder for images that lie in tables.
    config: whose problem sets the capability sets are; None: there is none.
    built: folder of sets that are built on first use.
    """

    data: Path | None
    unpacked: Path
    config: ConfigDict | None = None
    built: Path = Path("data")

    def of(self, name: str, benchmark: Benchmark) -> Path:
        """The file or folder. Raises InputError: none is known."""
        if benchmark.name != name:  # a file of the user's own
            return Path(name)
        if self.data is None and name in capability.NAMES and self.config is not None:
            return Sets(self.config.data, self.built).path(name, self.config.evaluation.split)
        if self.data is None:
            files = " or ".join(benchmark.files)
            raise InputError(f"{name}: give --data, a folder with {files}, from {benchmark.where}")
        if name in capability.NAMES:
            return tables.find(self.data, benchmark.files, benchmark.where)[1][0]
        return self.data


def choose(names: Sequence[str], source: Source, limit: int) -> list[Chosen]:
    """The rows of the benchmarks, at most `limit` of each (0: all).

    Raises:
      InputError: an unknown name, or sets that are missing or not as published; all of them are named.
    """
    found, wrong = [], []
    for name in dict.fromkeys(names):
        benchmark = registry.get(name)
        try:
            rows = benchmark.load(source.of(name, benchmark), source.unpacked)
        except InputError as error:
            wrong.append(f"{benchmark.name}: {error}" if benchmark.name not in str(error) else str(error))
            continue
        found.append(_chosen(benchmark, rows, limit))
    if wrong:
        raise InputError("\n".join(wrong))
    if len({one.benchmark.name for one in found}) < len(found):
        raise InputError("--benchmarks: two of them have one name; rename the file of one")
    return found


def _chosen(benchmark: Benchmark, rows: Sequence[Row], limit: int) -> Chosen:
    conditions: dict[str, Any] = {"set": benchmark.sets.get(len(rows), "a part, or a version that is not known")}
    if not benchmark.sets:
        conditions["set"] = "a file of problems"
    if isinstance(rows, tables.Rows):
        conditions |= {"file": rows.files[0].name, "digest": rows.digest, "left_out": rows.left_out}
        if version := benchmark.digests.get(rows.digest[:8]):
            conditions["version"] = version
    asked = _drawn(rows, limit, rows.files[0] if isinstance(rows, tables.Rows) else Path())
    partial = len(asked) < len(rows)
    return Chosen(benchmark, asked, conditions | {"rows": len(rows), "asked": len(asked), "partial": partial})


def _drawn(rows: Sequence[Row], limit: int, file: Path) -> Sequence[Row]:
    """The rows that hashes choose, in the file's order. Problems are drawn as a run draws its own (data/draw.py)."""
    if not limit or limit >= len(rows):
        return rows
    problems = [problem for row in rows if isinstance(problem := row.facts.get("problem"), Problem)]
    if len(problems) == len(rows):
        taken = {problem.id for problem in drawn(problems, limit, file)}
    else:
        taken = {row.index for row in sorted(rows, key=lambda row: stable_hash("drawn", row.index))[:limit]}
    return [row for row in rows if row.index in taken]
