"""The trainer's weights as files that rollout servers load: versions of safetensors in a directory that both see.

    version-00000007/update/     what changed since the last version
    version-00000007/complete/   every tensor, as a server that has just started needs them
    .partial-00000008/           being written; it appears under its name when all of it is there

Each directory has a manifest (manifest.py) with names, shapes, dtypes and checksums. A file holds one of our
parameters, or some layers of a large one, and nothing else: so a newer file of the same name supersedes it as a whole,
and what is frozen keeps its last file, whatever was frozen when. `complete` is hard links, which take no room: a file
is gone when no directory links to it any more.

Of several processes all make the store and call `write` together: they gather each tensor together, one of them writes
the file that it is in, and process 0 makes and removes directories. The directory must then be shared.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capcur_jax.devices import distributed
from capcur_jax.errors import InputError, RolloutError
from capcur_jax.models import huggingface, weight_files
from capcur_jax.models import lora as lora_lib
from capcur_jax.models.config import ModelConfig
from capcur_jax.models.lora import LoRA
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.rollout.sglang import manifest

KEY = "config.rollout.sglang.weights"
FILE_BYTES = 512 * 1000**2
HEADROOM = 1 << 20  # for headers and manifests
_OURS = re.compile(r"version-\d{8,}|\.partial-\d{8,}")


@dataclasses.dataclass(frozen=True)
class File:
    """A file of an update."""

    name: str
    bytes: int  # of its tensors
    checksums: Mapping[str, int]  # published name -> `weight_files.checksum`


@dataclasses.dataclass(frozen=True)
class Update:
    """A version on disk."""

    version: int
    directory: Path  # the tensors that changed since the last version; none: nothing changed, there is nothing to load
    complete: Path  # all tensors
    files: tuple[File, ...]  # of `directory`
    bytes: int  # of the tensors in `directory`
    seconds: Mapping[str, float]  # "gather": off the devices; "write": beyond that. Together the time that it took

    @property
    def checksums(self) -> dict[str, int]:
        """Of the tensors in `directory`, by published name."""
        return {name: number for file in self.files for name, number in file.checksums.items()}


class _Slice(NamedTuple):
    """A file to be: the name, and the tensors in the order in which they are gathered."""

    name: str
    shapes: dict[str, tuple[int, ...]]  # published name -> shape
    bytes: int


class WeightStore:
    """Writes versions of a model's parameters. What an earlier process left in the directory is removed.

    Args:
        directory: where to; memory-backed (/dev/shm) where servers run on this host, shared where there are several.
        config: of the model; names and shapes are checked against it.
        dtype: of the files.
        file_bytes: a file is at most as large, or has one tensor.
        writers: threads; the host holds one file's tensors for each, and one more.
        lora: what the model was made with.

    Raises:
        InputError: the directory can't be used, or another run uses it.
    """

    def __init__(
        self,
        directory: str | Path,
        config: ModelConfig,
        dtype,
        *,
        file_bytes: int = FILE_BYTES,
        writers: int = 4,
        lora: LoRA | None = None,
    ):
        self.directory = Path(directory)
        self._config, self._dtype, self._lora, self._writers = config, jnp.dtype(dtype), lora, writers
        self._shapes = _shapes(config)
        self._slices = {path: self._sliced(path, shape, file_bytes) for path, shape in self._shapes.items()}
        self._written: dict[str, tuple[weakref.ref | None, ...]] = {}  # by path: the arrays that its files came from
        self._contents: dict[str, dict] = {}  # of `complete`'s manifest
        self._last: Update | None = None
        self._lock = None
        error = None
        if distributed.is_owner():
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = _locked(self.directory / ".lock")
                for left in self._versions():
                    shutil.rmtree(left)
            except OSError as failed:
                error = InputError(f"{KEY} = {self.directory} can't be used ({failed}); choose another directory")
        self._together(error)

    def _sliced(self, path: str, shape: tuple[int, ...], file_bytes: int) -> list[_Slice]:
        """The files of a parameter."""
        shapes = huggingface.published_shapes(path, shape, self._config)
        size = int(np.prod(shape)) * self._dtype.itemsize // len(shapes)
        count = max(1, file_bytes // size)
        names = list(shapes)
        parts = [names[at : at + count] for at in range(0, len(names), count)]
        return [
            _Slice(f"{path}-{i:05d}-of-{len(parts):05d}.safetensors", {n: shapes[n] for n in part}, size * len(part))
            for i, part in enumerate(parts, 1)
        ]

    # ------------------------------------------------------------------ writing

    def write(self, parameters: nnx.State, version: int) -> Update:
        """Writes what changed since the last version: parameters that are not the very arrays that they were then.

        Versions ascend. To write the last one again, with the same arrays, gives the same update.

        Raises:
            ValueError: a parameter is missing or unknown, has another shape than the config says; the version is old.
            InputError: there is no room.
            RolloutError: a file could not be written. Earlier versions are whole; the same one can be tried again.
        """
        arrays = huggingface.sources(parameters, self._lora)
        self._check(arrays)
        flags = [not _same(self._written.get(path, ()), of) for path, of in arrays.items()]
        flags = distributed.exchange(np.array(flags)).any(0).tolist()  # all must take part in the same gathers
        changed = [path for path, flag in zip(arrays, flags, strict=True) if flag]
        if self._last is not None and version <= self._last.version:
            if version == self._last.version and not changed:
                return self._last
            raise ValueError(f"version {version} comes after version {self._last.version}")
        slices = [piece for path in changed for piece in self._slices[path]]
        self._check_room(version, sum(piece.bytes for piece in slices))
        partial, final = self._partial(version), self._final(version)
        began = time.perf_counter()
        sums, gather = self._write_slices(parameters, changed, slices, partial)
        update = self._update(version, slices, sums, {"gather": gather, "write": 0.0})
        error = None
        if distributed.is_owner():
            try:
                self._finish(update, partial, final)
            except OSError as failed:
                error = self._failure(version, failed)
        self._together(error, partial)
        self._contents |= _contents(update, slices, self._dtype)
        # An array that NumPy holds may be written to in place.
        self._written = {
            path: tuple(weakref.ref(a) if isinstance(a, jax.Array) else None for a in of) for path, of in arrays.items()
        }
        seconds = {"gather": gather, "write": time.perf_counter() - began - gather}
        self._last = dataclasses.replace(update, seconds=seconds)
        return self._last

    def _check(self, arrays: Mapping[str, tuple]) -> None:
        """A name that a server doesn't know ends the server; a tensor that is left out stays an old one there."""
        for path in arrays:
            if path not in self._shapes:
                raise ValueError(f"{path} is no parameter of the {self._config.family} that the config describes")
        for path, shape in self._shapes.items():
            if path not in arrays:
                name = next(iter(self._slices[path][0].shapes))
                raise ValueError(f"the parameter {path} is missing, and with it the tensor {name}")
            if arrays[path][0].shape != shape:
                raise ValueError(f"the parameter {path} has shape {arrays[path][0].shape}, the config says {shape}")

    def _check_room(self, version: int, needed: int) -> None:
        """And a place to write to, on all hosts."""
        error, partial = None, self._partial(version)
        if distributed.is_owner():
            try:
                shutil.rmtree(partial, ignore_errors=True)
                for side in ("update", "complete"):
                    (partial / side).mkdir(parents=True)
                free = shutil.disk_usage(self.directory).free
                if free < needed + HEADROOM:
                    error = InputError(
                        f"{KEY} = {self.directory} has {free:,} bytes left; version {version} of the weights needs "
                        f"{needed + HEADROOM:,}. Choose a directory with room for two versions"
                    )
            except OSError as failed:
                error = self._failure(version, failed)
        self._together(error, partial)
        absent = not partial.is_dir()
        self._together(
            InputError(f"{KEY} = {self.directory} is not shared: a process sees no {partial.name}") if absent else None,
            partial,
        )

    def _write_slices(
        self, parameters: nnx.State, changed: list[str], slices: list[_Slice], partial: Path
    ) -> tuple[dict[str, int], float]:
        """Gathers and writes at the same time; checksums of all processes' tensors, and the seconds of gathering."""
        owner = _owners(slices)
        mine = {name for piece in slices if owner[piece.name] == distributed.process_id() for name in piece.shapes}
        tensors = huggingface.published_tensors(
            parameters, self._config, self._dtype, self._lora, only=frozenset(changed), mine=mine.__contains__
        )
        slots, tasks, gather, error = threading.Semaphore(self._writers), [], 0.0, None
        try:
            with ThreadPoolExecutor(self._writers, thread_name_prefix="weights") as pool:
                for piece in slices:
                    began = time.perf_counter()
                    held = dict(itertools.islice(tensors, len(piece.shapes)))
                    gather += time.perf_counter() - began
                    broken = any(task.done() and task.exception() for task in tasks)
                    if broken and distributed.process_count() == 1:
                        break  # where there are others, they wait for this one in every gather
                    if owner[piece.name] == distributed.process_id() and not broken:
                        slots.acquire()
                        tasks.append(pool.submit(weight_files.write, partial / "update" / piece.name, held))
                        tasks[-1].add_done_callback(lambda _: slots.release())
                    del held  # the task's alone
            sums = {name: number for task in tasks for name, number in task.result().items()}
        except OSError as failed:
            error, sums = self._failure(int(partial.name.rpartition("-")[2]), failed), {}
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._together(error, partial)
        names = [name for piece in slices for name in piece.shapes]
        numbers = distributed.exchange(np.array([sums.get(name, 0) for name in names], np.uint64)).max(0)
        return dict(zip(names, numbers.tolist(), strict=True)), gather

    def _update(self, version: int, slices: list[_Slice], sums: dict[str, int], seconds: dict[str, float]) -> Update:
        files = tuple(File(p.name, p.bytes, {name: sums[name] for name in p.shapes}) for p in slices)
        final, size = self._final(version), sum(p.bytes for p in slices)
        return Update(version, final / "update", final / "complete", files, size, seconds)

    def _finish(self, update: Update, partial: Path, final: Path) -> None:
        """The manifests and links; then all of it appears at once. Raises OSError."""
        slices = {piece.name: piece for pieces in self._slices.values() for piece in pieces}
        new = _contents(update, [slices[file.name] for file in update.files], self._dtype)
        contents, fresh = self._contents | new, {file.name for file in update.files}
        for name in {entry["file"] for entry in contents.values()}:
            source = partial / "update" if name in fresh else self._last.complete
            os.link(source / name, partial / "complete" / name)
        for side, tensors in (("update", new), ("complete", contents)):
            manifest.write(partial / side, update.version, tensors)
        os.rename(partial, final)

    # ------------------------------------------------------------------ what is there

    @property
    def last(self) -> Update | None:
        """The newest version."""
        return self._last

    def discard(self, before: int) -> None:
        """Removes the versions before that one, but never the last. Nothing of the last one's `complete` is lost.

        A server that is `before` or newer can go on with updates; an older one needs `complete`.
        """
        if not distributed.is_owner():
            return
        for path in self._versions():
            version = int(path.name.rpartition("-")[2])
            if version < before and (self._last is None or version != self._last.version):
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Removes all versions: no server loads any more."""
        for path in self._versions() if distributed.is_owner() and self._lock else ():
            shutil.rmtree(path, ignore_errors=True)
        self._last, self._contents, self._written = None, {}, {}
        if self._lock:
            self._lock.close()
            self._lock = None

    def _versions(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if _OURS.fullmatch(path.name)]

    def _partial(self, version: int) -> Path:
        return self.directory / f".partial-{version:08d}"

    def _final(self, version: int) -> Path:
        return self.directory / f"version-{version:08d}"

    # ------------------------------------------------------------------ errors

    def _failure(self, version: int, error: OSError) -> RolloutError:
        return RolloutError(
            f"version {version} of the weights could not be written to {self.directory} ({error}); the directory "
            f"({KEY}) must have room for two versions, and a file system with hard links"
        )

    def _together(self, error: Exception | None, partial: Path | None = None) -> None:
        """Raises in all processes if there is an error in one; what was half-written is then removed."""
        if not distributed.agree(error is not None):
            return
        if partial is not None and distributed.is_owner():
            shutil.rmtree(partial, ignore_errors=True)
        raise error or RolloutError(f"another process could not use {self.directory}; its own message says why")


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our path -> shape of each published parameter of such a model."""
    abstract = nnx.state(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    shapes = {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(abstract)}
    return {path: shape for path, shape in shapes.items() if not lora_lib.is_factor(path)}


def _same(before: tuple[weakref.ref | None, ...], now: tuple) -> bool:
    """Whether these are the very arrays. An array that is no more can't be one of them, whatever has its address."""
    return len(before) == len(now) and all(ref and ref() is array for ref, array in zip(before, now, strict=True))


def _owners(slices: list[_Slice]) -> dict[str, int]:
    """File -> the process that writes it: the one with the least to write so far, the same answer in all of them."""
    load, owner = [0] * distributed.process_count(), {}
    for piece in slices:
        owner[piece.name] = load.index(min(load))
        load[owner[piece.name]] += piece.bytes
    return owner


def _contents(update: Update, slices: list[_Slice], dtype: np.dtype) -> dict[str, dict]:
    """The manifest's entries of an update."""
    return {
        name: {
            "file": piece.name,
            "dtype": weight_files.KINDS[dtype],
            "shape": list(shape),
            "checksum": file.checksums[name],
        }
        for piece, file in zip(slices, update.files, strict=True)
        for name, shape in piece.shapes.items()
    }


def _locked(file: Path):
    """An open file that no other store has. Raises InputError."""
    opened = open(file, "w")  # noqa: SIM115, the store closes it
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        raise InputError(f"{KEY} = {file.parent} is in use by another run; choose a directory for each") from None
    except OSError:  # a file system without locks: two runs in one directory are then not noticed
        pass
    return opened
