"""`--list`: the benchmarks, their rows, files and where they are published."""

from __future__ import annotations

from capcur_jax.evaluation.benchmarks import registry


def lines() -> list[str]:
    """A block of lines for each benchmark."""
    found = []
    for benchmark in registry.benchmarks().values():
        sets = ", ".join(f"{count:,} ({name})" if name else f"{count:,}" for count, name in benchmark.sets.items())
        found += [f"{benchmark.name}: {benchmark.title}", f"    rows: {sets or 'as many as the file has'}"]
        found += [f"    files: {', '.join(benchmark.files)}", f"    from: {benchmark.where}"]
    return found
