"""Files that commands write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from capcur_jax.data.rows import FORMATS
from capcur_jax.errors import InputError


def output_file(name: str, *inputs: str, option: str = "--output") -> Path:
    """The file of rows to write. Raises InputError now, not after hours of work, where it can't be written."""
    path = Path(name)
    if path.suffix not in FORMATS:
        raise InputError(f"{option} {path}: the name must end in {' or '.join(FORMATS)}")
    if path.is_dir():
        raise InputError(f"{option} {path}: a folder; give a file")
    not_among(path, inputs, option)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}: its folder can't be made ({error.strerror}); give another") from None
    return path


def not_among(path: Path, others: Iterable[str], option: str) -> None:
    """Raises InputError where a file to write is one that the command reads, or writes besides."""
    if any(Path(other).resolve() == path.resolve() for other in others):
        raise InputError(f"{option} {path}: the command names that file already; give another")


def journal_file(output: Path, part: str = "") -> Path:
    """The journal beside an output: OUTPUT.journal.jsonl, with a part's name before `journal`."""
    return output.with_name(".".join([output.name, *([part] if part else []), "journal.jsonl"]))
