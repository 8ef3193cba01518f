"""All benchmarks by name: a module of this package with BENCHMARK, or BENCHMARKS, is one."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path

from capcur_jax.errors import InputError
from capcur_jax.evaluation.benchmarks.base import Benchmark

# The paper's eight, then the others; one that is not here comes last.
ORDER = (
    "mathvista", "mathvision", "mathverse_vision_intensive", "wemath", "aokvqa", "realworldqa", "mmstar", "pope",
    "mathverse_vision_only", "dynamath", "hallusionbench", "blink", "visonlyqa", "cvbench_2d", "vstar", "chartqa",
    "textvqa", "perception", "text", "visual",
)  # fmt: skip


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
    """Name -> benchmark, in the order of `ORDER`."""
    found: dict[str, Benchmark] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "registry":
            loaded = importlib.import_module(f"{__package__}.{module.name}")
            one = getattr(loaded, "BENCHMARK", None)
            found |= {each.name: each for each in getattr(loaded, "BENCHMARKS", (one,) if one else ())}
    return {name: found[name] for name in sorted(found, key=lambda name: (*ORDER, name).index(name))}


def get(name: str) -> Benchmark:
    """The benchmark of a name, or of a file of problems. Raises InputError."""
    if name not in benchmarks() and Path(name).suffix and Path(name).is_file():
        return importlib.import_module(f"{__package__}.capability").of_file(Path(name))
    if name not in benchmarks():
        raise InputError(f"no benchmark {name!r}; choose from {', '.join(benchmarks())}, or a file of problems")
    return benchmarks()[name]
