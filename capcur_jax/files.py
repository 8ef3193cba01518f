"""Files that are whole or not there: what is written beside its place, and renamed over it. Work directories."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterator
from pathlib import Path

from capcur_jax.errors import InputError


def write_atomically(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Writes `content` so that a reader sees the old file or the new one, never half of it; see `replacing`."""
    with replacing(path, sync=sync) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Gives a path beside `path` (made with its folders). The file that the block writes there is renamed over `path`.

    Where the block raises, `path` stays as it was and nothing is left.

    Args:
      sync: whether the content is on the disk before the rename, so that a machine that fails later does not leave an
        empty file. A flush costs milliseconds: many small files that are checked when they are read do without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}"
    )  # a rename across disks isn't atomic
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's names, would survive a failure of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def must_be_local(where: str, path: str) -> None:
    """Raises InputError for a bucket's address: everything here is read and written as files."""
    if re.match(r"(gs|s3|gcs|s3a|az|abfss?|hdfs)://", path):
        raise InputError(
            f"{where}={path}: a bucket's address, and files are read and written by path alone; mount the bucket, or "
            "copy what is read to a disk (docs/clusters.md, buckets)"
        )


def prepare_workdir(path: str | None, name: str) -> Path:
    """The work directory: a new one, dated and with the name, or the given one, which may hold what is to go on.

    Raises InputError: it can't be made.
    """
    must_be_local("--workdir", path or "")
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    workdir = Path(path) if path else Path("runs") / f"{stamp}_{name}"
    try:
        # Two runs that start in the same second must not share a dated folder.
        while not path and workdir.exists():
            workdir = workdir.with_name(workdir.name + "_")
        workdir.mkdir(parents=True, exist_ok=bool(path))
    except OSError as error:
        raise InputError(f"--workdir={workdir} can't be made ({error.strerror}); give another one") from None
    return workdir
