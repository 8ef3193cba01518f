"""The problem sets of a config: the user's own files, or sets that are built on first use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from capcur_jax.data.curriculum import Curriculum
from capcur_jax.data.draw import drawn
from capcur_jax.data.problem import SPLITS, Problem
from capcur_jax.data.rows import read_problems
from capcur_jax.data.sources import easy_vqa, tiny_base, word_problems
from capcur_jax.errors import InputError
from capcur_jax.hub import download

SOURCES = {"easy_vqa": easy_vqa.build, "word_problems": word_problems.build, "tiny_base": tiny_base.build}


class Sets:
    """The problem sets by name and split; each file is read once.

    Args:
      directory: for sets that are built.
      commits: of the Hub's repositories, where a run goes on; see hub/download.py.
    """

    def __init__(self, config: ConfigDict, directory: Path, commits: Mapping[str, str] | None = None):
        self._config, self._directory, self._commits = config, directory, commits or {}
        self._downloaded: dict[str, Path] = {}
        self._built: dict[str, dict[str, Path]] = {}
        self._read: dict[tuple[str, str], list[Problem]] = {}
        self._drawn: dict[tuple[str, str, int], list[Problem]] = {}
        self.skipped_rows: dict[tuple[str, str], list[str]] = {}
        self.repaired_rows: dict[tuple[str, str], list[Problem]] = {}  # read otherwise than they are written

    def path(self, name: str, split: str) -> Path:
        """The file of a set's split. Raises InputError naming the config key and the remedy."""
        key, entry = f"config.data.sets.{name}", self._config.sets[name]
        if entry[split].startswith(download.DATA):
            if entry[split] not in self._downloaded:
                found = download.data_file(entry[split], f"{key}.{split}", self._commits)
                self._downloaded[entry[split]] = found
            return self._downloaded[entry[split]]
        if entry[split]:
            return Path(entry[split]).expanduser()
        if self.missing(name, split):
            raise InputError(f"{key}.{split} is empty: {self.missing(name, split)}")
        if entry.source not in SOURCES:
            raise InputError(f"{key}.source = {entry.source!r}; choose one of {', '.join(SOURCES)}")
        if name not in self._built:
            self._built[name] = SOURCES[entry.source](self._directory, name)
        return self._built[name][split]

    def missing(self, name: str, split: str) -> str:
        """What is needed for a split that has neither a file nor a source; "" where nothing is missing.

        A set with a file of the user's own in one split is the user's in all: training on own rows and testing on
        built ones would mix two tasks under one name.
        """
        entry, flag = self._config.sets[name], f"--config.data.sets.{name}.{split}=FILE"
        if entry[split] or (entry.source and not any(entry[other] for other in SPLITS)):
            return ""
        return f"name a .jsonl or .parquet file of problems ({flag}; rows have problem, answer, images)"

    def problems(self, name: str, split: str) -> list[Problem]:
        """The good rows of a set's split; the others are in `skipped_rows`, mended ones in `repaired_rows` too."""
        if (name, split) not in self._read:
            try:
                rows, drops = read_problems(self.path(name, split), name, images=self._directory / "unpacked")
            except InputError as error:
                raise InputError(f"config.data.sets.{name}.{split}: {error}") from None
            # What a model once answered is of no use here, and thousands of texts need not be held.
            self._read[name, split] = [dataclasses.replace(row, predictions=()) for row in rows]
            if drops:
                self.skipped_rows[name, split] = [str(drop) for drop in drops]
            if repaired := [row for row in self._read[name, split] if row.repaired]:
                self.repaired_rows[name, split] = repaired
        return self._read[name, split]

    def drawn(self, name: str, split: str, count: int) -> list[Problem]:
        """`count` problems of a set's split, 0: all; see draw.py."""
        found = self._drawn.get((name, split, count))
        if found is None:  # each evaluation asks, and ordering hashes every row
            found = drawn(self.problems(name, split), count, self.path(name, split))
            self._drawn[name, split, count] = found
        return list(found)

    def pool(self, names: Sequence[str], split: str) -> list[Problem]:
        """The problems of several sets, one after the other."""
        return [problem for name in names for problem in self.problems(name, split)]

    def selected(self, names: Sequence[str], curriculum: Curriculum) -> list[list[Problem]]:
        """The training problems of each set that the curriculum leaves, in the order of the file. Raises InputError."""
        found = []
        for name in names:
            kept = curriculum.select(self.problems(name, "train"), f"config.data.sets.{name}.train")
            if 0 < curriculum.rows < len(kept):
                taken = {problem.id for problem in drawn(kept, curriculum.rows, self.path(name, "train"))}
                kept = [problem for problem in kept if problem.id in taken]
            found.append(kept)
        return found

    def capabilities(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the sets' training problems, in the same order in every process."""
        return tuple(sorted({problem.capability for problem in self.pool(names, "train")}))

    def fetch(self, splits: Iterable[tuple[str, str]]) -> None:
        """Has those of the (set, split) downloaded that lie on the Hub. Of several processes all call this."""
        for name, split in sorted(splits):
            if split in SPLITS and self._config.sets.get(name, {}).get(split, "").startswith(download.DATA):
                self.path(name, split)

    def version(self, name: str, split: str) -> str:
        """What the Hub has under the name of a set's file; "" where that lies on this machine."""
        spec = self._config.sets[name][split]
        return download.version(spec, self.path(name, split)) if spec.startswith(download.DATA) else ""

    def build(self, names: Iterable[str], split: str) -> None:
        """Has the sets built that are built on first use; a set without training problems has those of `split`."""
        for name in sorted(names):
            self.path(name, split if self.missing(name, "train") else "train")
