"""Sets of problem files that are built on first use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from capcur_jax.data.problem import SPLITS, Problem
from capcur_jax.data.rows import write_rows
from capcur_jax.files import write_atomically


def build_set(
    directory: str | os.PathLike,
    name: str,
    version: str,
    make: Callable[[], dict[str, list[Problem]]],
    splits: Sequence[str] = SPLITS,
) -> dict[str, Path]:
    """Gives the files `directory/<name>-<split>.jsonl`, making them where they are not there yet.

    A manifest `<name>.json` with the version and the files' digests is written last. Files without it, of another
    version, or changed since are made again. `make` must be deterministic: two processes that build at the same time
    then put equal files in place.

    Args:
      make: gives the rows of each split; called only to build.
    """
    directory = Path(directory)
    files = {split: directory / f"{name}-{split}.jsonl" for split in splits}
    manifest_file = directory / f"{name}.json"
    if not (manifest_file.is_file() and manifest_file.read_bytes() == _manifest(version, files)):
        rows = make()
        manifest_file.unlink(missing_ok=True)
        for split, file in files.items():
            write_rows(file, rows[split])
        write_atomically(manifest_file, _manifest(version, files))
    return files


def _manifest(version: str, files: dict[str, Path]) -> bytes:
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "" for f in files.values()}
    return (json.dumps({"version": version, "sha256": digests}, indent=1) + "\n").encode()
