"""Reward functions of a user's, for whole runs: light to import, since each worker does."""

from capcur_jax.data.problem import Problem


def by_length(problem: Problem, response: str) -> float:
    """A random model's groups differ in nothing else."""
    return 1.0 if len(response) % 2 else 0.0


def equal_validations(problem: Problem, response: str) -> float:
    """Every validation question is answered rightly; training questions are not, so that parameters move."""
    return 1.0 if problem.capability == "perception" or len(response) % 2 else 0.0
