"""Which of a stage's problems are trained on, in which order: curricula as configuration (paper, Table 7), by grain.

An order is a function of the number of the example alone: a run goes on from a number, and any number of processes
see the same problems in the same steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence

import grain
from ml_collections import ConfigDict

from capcur_jax.data.problem import Problem, stable_hash
from capcur_jax.errors import InputError

ORDERS = ("shuffled", "easy_to_hard", "hard_to_easy", "file")
TIES = ("shuffled", "kept")


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """`config.stages.NAME.curriculum`; presets.py says what the keys do."""

    order: str = "shuffled"
    ties: str = "shuffled"
    by_set: bool = False
    weights: tuple[float, ...] = ()
    rows: int = 0
    pass_rates: tuple[float, float] = (0.0, 1.0)
    drop_all_right: bool = False
    drop_all_wrong: bool = False
    drop_last: bool = False

    @classmethod
    def from_config(cls, config: ConfigDict, where: str, sets: int) -> Curriculum:
        """Checked; `where` is the section's name in messages, `sets` how many the stage has. Raises InputError."""
        values = config.to_dict()
        made = cls(**values | {"weights": tuple(values["weights"]), "pass_rates": tuple(values["pass_rates"])})
        for key, choices in (("order", ORDERS), ("ties", TIES)):
            if (value := getattr(made, key)) not in choices:
                raise InputError(f"{where}.{key} = {value!r}; choose one of {', '.join(choices)}")
        if len(made.pass_rates) != 2 or not 0 <= made.pass_rates[0] <= made.pass_rates[1] <= 1:
            raise InputError(f"{where}.pass_rates = {made.pass_rates}: give the least and the greatest, such as (0, 1)")
        if made.weights and (len(made.weights) != sets or min(made.weights) <= 0):
            raise InputError(f"{where}.weights = {made.weights}: give each of the stage's {sets} sets one above 0")
        if made.weights and made.by_set:
            raise InputError(f"{where}: by_set takes the sets one after the other, weights mixes them; choose one")
        return made

    def described(self) -> str:
        """In a few words, for people; nothing of one shuffled pool."""
        said = [] if self.order == "shuffled" else [self.order]
        said += [f"mixed {':'.join(f'{weight:g}' for weight in self.weights)}"] if self.weights else []
        said += ["set by set"] if self.by_set else []
        return f" ({', '.join(said)})" if said else ""

    @property
    def by_difficulty(self) -> bool:
        """Whether every problem needs a pass rate."""
        selects = self.drop_all_right or self.drop_all_wrong or self.pass_rates != (0.0, 1.0)
        return selects or self.order in ("easy_to_hard", "hard_to_easy")

    def select(self, problems: Sequence[Problem], where: str) -> list[Problem]:
        """A set's problems that are trained on. Raises InputError where pass rates are missing, or none is left."""
        if not self.by_difficulty:
            return list(problems)
        without = [problem.id for problem in problems if problem.pass_rate is None]
        if without:
            raise InputError(
                f"{where}: {len(without)} of {len(problems)} rows have no pass_rate, which its stage's curriculum "
                f"needs (the first: {without[0]!r}); measure them: python -m capcur_jax.data difficulty --help"
            )
        least, most = self.pass_rates
        kept = [
            problem
            for problem in problems
            if least <= problem.pass_rate <= most
            and not (self.drop_all_right and problem.pass_rate == 1)
            and not (self.drop_all_wrong and problem.pass_rate == 0)
        ]
        if not kept:
            raise InputError(f"{where}: the stage's curriculum leaves none of {len(problems)} rows; widen it")
        return kept

    def steps(self, counts: Sequence[int], prompts: int, epochs: int, where: str) -> int:
        """Steps of `epochs` over sets with these counts of selected problems. Raises InputError where there is none."""
        if self.weights:
            raise InputError(f"{where}: sets that are mixed by weights have no epochs; give steps")
        batches = sum(counts) // prompts * epochs if self.drop_last else sum(counts) * epochs // prompts
        if not batches:
            raise InputError(
                f"{where}: {sum(counts)} rows make no step of {prompts} prompts; add rows or lower prompts"
            )
        return batches

    def arrange(self, sets: Sequence[Sequence[Problem]], seed: int, prompts: int) -> grain.MapDataset:
        """The selected problems without end, epoch after epoch; shuffled ones anew in each.

        Args:
          sets: the stage's, in the order of its `data`.
          prompts: of a step; with `drop_last` what is left of an epoch after its last whole step is left out.
        """
        if self.weights:
            if not all(sets):
                raise InputError("a set that weights ask for has no problem that can be used")
            parts = [self._ordered(problems, seed + number) for number, problems in enumerate(sets)]
            return grain.MapDataset.mix(parts, weights=self.weights)
        if not self.by_set:
            sets = [list(itertools.chain.from_iterable(sets))]
        parts = [self._ordered(problems, seed + number) for number, problems in enumerate(sets)]
        ends = list(itertools.accumulate(map(len, sets)))
        epoch = ends[-1] // prompts * prompts if self.drop_last else ends[-1]
        if not epoch:
            raise InputError(f"{ends[-1]} rows make no step of {prompts} prompts, and drop_last leaves them out")

        def at(number: int) -> Problem:
            turn, within = divmod(number, epoch)
            part = next(part for part, end in enumerate(ends) if within < end)
            length = len(sets[part])
            return parts[part][turn * length + within - (ends[part] - length)]

        return grain.MapDataset.range(sys.maxsize // 2).map(at)

    def _ordered(self, problems: Sequence[Problem], seed: int) -> grain.MapDataset:
        """One pool, without end."""
        if self.order == "shuffled":
            return grain.MapDataset.source(problems).seed(seed).shuffle().repeat()
        if self.order != "file":
            if self.ties == "shuffled":
                problems = sorted(problems, key=lambda problem: stable_hash(seed, problem.id))
            sign = -1 if self.order == "easy_to_hard" else 1
            problems = sorted(problems, key=lambda problem: sign * problem.pass_rate)  # stable
        return grain.MapDataset.source(problems).repeat()
