"""What a run reads, by its bytes: a run that goes on reads the same, or says what it no longer does."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ml_collections import ConfigDict

from capcur_jax.checkpoints.store import difference
from capcur_jax.data.sets import Sets
from capcur_jax.errors import InputError
from capcur_jax.hub import download
from capcur_jax.records import jsonl, metrics

NAME = "inputs.json"
FLAG = "--accept_changed_inputs"
_LARGE = 1 << 28  # bytes of a file from which on its ends stand for it
_END = 1 << 20
_NO_PACKAGE = ("platform", "commit", "dirty")  # versions.json has them
_OF_SAVED = (".arrow", ".json")
_OF_CHECKPOINT = (".json", ".jinja", ".txt", ".model", ".safetensors")


def of_run(
    config: ConfigDict, sets: Sets, splits: Iterable[tuple[str, str]], source: Path | None = None
) -> dict[str, str]:
    """Key -> what is read there: data files and their images, the starting checkpoint, the reward, the packages.

    What comes from the Hub is told by its commit, which names its content.

    Args:
      splits: (set, split) that the run uses.
      source: the directory of config.checkpoint, where that is a name on the Hub.
    """
    found = {}
    for name, split in sorted(splits):
        key = f"data.sets.{name}.{split}"
        found[key] = sets.version(name, split) or _of_data(sets.path(name, split))
        images = [image for problem in sets.problems(name, split) for image in problem.images]
        if images:
            found[f"{key}: images"] = _of_images(images)
    directory = source or Path(config.checkpoint).expanduser()
    if config.checkpoint and (version := download.version(config.checkpoint, directory)):
        found["checkpoint"] = version
    elif config.checkpoint:
        files = (file for file in sorted(directory.glob("*")) if file.suffix in _OF_CHECKPOINT and file.is_file())
        found |= {f"checkpoint: {file.name}": of_file(file) for file in files}
    if config.reward.function:
        found["reward.function"] = _of_module(config.reward.function.partition(":")[0])
    versions = metrics.versions()
    return found | {f"versions: {name}": str(versions[name]) for name in versions if name not in _NO_PACKAGE}


def _of_data(path: Path) -> str:
    """A data file, or the files of a folder of `save_to_disk`."""
    if not path.is_dir():
        return of_file(path)
    files = {file.name: of_file(file) for file in sorted(path.iterdir()) if file.suffix in _OF_SAVED and file.is_file()}
    return f"{len(files)} files, sha256 of theirs {hashlib.sha256(json.dumps(files).encode()).hexdigest()}"


def of_file(file: Path) -> str:
    """Size and content; of a large file the content of its ends, and when it was changed last."""
    status, digest = file.stat(), hashlib.sha256()
    with open(file, "rb") as opened:
        if status.st_size < _LARGE:
            return f"{status.st_size} bytes, sha256 {hashlib.file_digest(opened, lambda: digest).hexdigest()}"
        digest.update(opened.read(_END))
        opened.seek(-_END, os.SEEK_END)
        digest.update(opened.read(_END))
    return f"{status.st_size} bytes, sha256 of the ends {digest.hexdigest()}, changed at {status.st_mtime_ns} ns"


def _of_images(paths: list[str]) -> str:
    """Their sizes: the bytes of a hundred thousand images would take minutes."""
    sizes = [os.path.getsize(path) if os.path.isfile(path) else -1 for path in dict.fromkeys(paths)]
    return f"{len(sizes)} files, sha256 of their sizes {hashlib.sha256(json.dumps(sizes).encode()).hexdigest()}"


def _of_module(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    file = Path(spec.origin) if spec and spec.origin else None
    return of_file(file) if file and file.is_file() else "no file"  # what can't be imported is said where it is needed


def commits(workdir: Path) -> dict[str, str]:
    """Repository of the Hub -> commit that the run in `workdir` began with: one that goes on reads the same."""
    try:
        stored = json.loads((workdir / NAME).read_text(encoding="utf-8"))
        return download.begun_with(stored["inputs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # `check` says what is wrong with the file


def check(workdir: Path, now: dict[str, str], step: int | None, accept: bool, warn: Callable[[str], None]) -> None:
    """Compares what a run reads now with what it read when it began, and keeps it in `workdir`/inputs.json.

    Args:
      now: of `of_run`.
      step: that the run goes on after; None: it begins, and there is nothing to compare with.
      accept: whether a difference is recorded there, under "accepted", instead of refused.

    Raises:
      InputError: the differences, by key.
    """
    file, accepted = workdir / NAME, []
    if step is not None and file.exists():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            before, accepted = stored["inputs"], stored["accepted"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file} is broken; put it back, or delete it to go on without the comparison") from None
        if changes := difference(before, now, "stored", "new"):
            if not accept:
                raise InputError(
                    f"this run read something else when it began (stored -> new):\n{changes}\nPut it back; or go on "
                    f"with what is there now and have that recorded: {FLAG}; or give another --workdir."
                )
            warn(f"goes on after step {step} with other inputs, as {FLAG} asks (stored -> new):\n{changes}")
            keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
            changed = {key: [before.get(key), now.get(key)] for key in keys}
            accepted = [*accepted, {"after_step": step, "changed": changed}]
    elif step is not None:
        warn(f"{file} is not there: whether this run reads what it read when it began is not known")
    jsonl.write_json_atomic(file, {"inputs": now, "accepted": accepted})
