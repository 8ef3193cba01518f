"""Numbered pytrees of arrays, each with a JSON document, in a directory: Orbax's manager and what it lacks.

They are written while the training goes on. A tree is complete or not there at all, and can be restored on any mesh.
Each has the sums of its files beside them, so that what a disk did to it later is found before it is used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from capcur_jax.errors import InputError
from capcur_jax.files import write_atomically

_ARRAYS, _DOCUMENT = "arrays", "document"
_TEMPORARY = "*.orbax-checkpoint-tmp*"
_SUMS = "sums.json"  # of a step's files: bytes and CRC-32 by name
_CHANGED = "_CHECKPOINT_METADATA"  # Orbax writes it once more when the tree has its name; nothing here reads it
_DOCUMENT_FILE = "metadata"
_PIECE = 1 << 22  # bytes that are summed at once
_SMALL = 1 << 16  # bytes of what is read at once
# What a full disk, a quota or a file-size limit looks like, from Python and from TensorStore.
_FULL = ("no space left", "quota exceeded", "file too large")

# Orbax reports progress and, with its traceback, each failure that is raised here again.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class CheckpointFailed(InputError):
    """A checkpoint could not be written; what was complete before it still is."""


class Store:
    """Numbered trees in `directory`: the last `keep` of them (None for all), and that of the highest metric, the
    earliest of equals. One method runs at a time, and in all processes of the run.

    Args:
      directory: made if it does not exist; what killed processes left there is removed.
      keep: see above.
      timeout: seconds that writing one may take.
    """

    def __init__(self, directory: Path, keep: int | None, timeout: int):
        self.directory = directory
        self._processes = set(range(jax.process_count()))
        self._prefix = directory.name  # of barriers: two stores may write at the same time
        self._bytes: dict[int, int] = {}
        directory.mkdir(parents=True, exist_ok=True)
        # Every process lists the directory next. With the processes named, Orbax meets at barriers of the coordination
        # service, not at a collective, which it would have to compile.
        ocp.multihost.sync_global_processes(f"{self._prefix}:open", processes=self._processes)
        sharing = ocp.options.MultiprocessingOptions(
            active_processes=self._processes, barrier_sync_key_prefix=self._prefix
        )
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            best_fn=_rank,
            create=False,
            cleanup_tmp_directories=True,
            multiprocessing_options=sharing,
            # In the thread that writes, before the tree gets its name: nothing waits for it, and no tree is without.
            async_options=ocp.AsyncOptions(timeout_secs=timeout, post_finalization_callback=self._write_sums),
        )
        # Replicated arrays are written by one replica: sharing them out would compile a slice for every shape and hold
        # the slices on the device. Weights hardly compress, and compression takes the cores from a run on a CPU.
        types = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)),
            (np.ndarray, ocp.type_handlers.NumpyHandler()),
        )
        arrays = ocp.PyTreeCheckpointHandler(
            use_compression=False, multiprocessing_options=sharing, type_handler_registry=types
        )
        document = ocp.JsonCheckpointHandler(_DOCUMENT_FILE, multiprocessing_options=sharing)
        registry = ocp.DefaultCheckpointHandlerRegistry()
        for arguments in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
            registry.add(_ARRAYS, arguments, arrays)
        for arguments in (ocp.args.JsonSave, ocp.args.JsonRestore):
            registry.add(_DOCUMENT, arguments, document)
        self._manager = ocp.CheckpointManager(directory, options=options, handler_registry=registry)

    def all(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return max(self._manager.all_steps(), default=None)

    def save(self, step: int, tree: Any, document: dict, metric: float | None = None) -> None:
        arrays = {name: _savable(leaf) for name, leaf in _named(tree).items()}
        kinds = {name: _kind(array) for name, array in arrays.items()}
        self._bytes = {step: sum(array.nbytes for array in arrays.values())}
        items = ocp.args.Composite(
            **{
                _ARRAYS: ocp.args.PyTreeSave(arrays),
                _DOCUMENT: ocp.args.JsonSave(plain({**document, "arrays": kinds})),
            }
        )
        with self._explained():
            metrics = None if metric is None else {"metric": float(metric), "step": step}
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def wait(self) -> None:
        """Until what is being written is complete; raises what went wrong, once."""
        with self._explained():
            self._manager.wait_until_finished()

    def document(self, step: int) -> dict:
        self._check(step)
        return self._manager.restore(step, args=ocp.args.Composite(**{_DOCUMENT: ocp.args.JsonRestore()}))[_DOCUMENT]

    def restore(self, step: int, abstract: Any) -> Any:
        wanted = _named(abstract)
        stored = self.document(step)["arrays"]
        kinds = {name: _kind(leaf) for name, leaf in wanted.items()}
        if stored != kinds:
            raise InputError(
                f"{self.directory / str(step)} does not fit the model and optimizer of this config:\n"
                + difference(stored, kinds, "checkpoint", "config")
            )
        here = SingleDeviceSharding(jax.local_devices()[0])
        arguments = {
            name: ocp.ArrayRestoreArgs(
                restore_type=jax.Array, sharding=leaf.sharding or here, global_shape=leaf.shape, dtype=leaf.dtype
            )
            for name, leaf in wanted.items()
        }
        items = ocp.args.Composite(**{_ARRAYS: ocp.args.PyTreeRestore(item=wanted, restore_args=arguments)})
        arrays = self._manager.restore(step, args=items)[_ARRAYS]
        return jax.tree.structure(abstract).unflatten([arrays[name] for name in wanted])

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """All of a step's arrays by dotted path, whatever tree they were saved from."""
        shapes = {}
        for name, kind in self.document(step)["arrays"].items():
            dtype, _, shape = kind.removesuffix("]").partition("[")
            shapes[name] = jax.ShapeDtypeStruct(tuple(int(size) for size in shape.split(",") if size), dtype)
        return {name: np.asarray(array) for name, array in self.restore(step, shapes).items()}

    def _write_sums(self) -> None:
        (folder,) = self.directory.glob(_TEMPORARY)
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != _CHANGED)
        sums = {path.relative_to(folder).as_posix(): (path.stat().st_size, _sum(path)) for path in files}
        write_atomically(folder / _SUMS, json.dumps(sums).encode())

    def delete(self, step: int) -> None:
        self._manager.delete(step)

    def close(self) -> None:
        self._manager.close()

    def _check(self, step: int) -> None:
        if step not in self._manager.all_steps():
            raise InputError(f"{self.directory} has no checkpoint of step {step}, only of {self.all() or 'none'}")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if jax.process_index() == 0:
                for part in self.directory.glob(_TEMPORARY):
                    shutil.rmtree(part, ignore_errors=True)
            self._manager.reload()
            reason = _reason(error)
            if not reason:
                raise
            ((step, needed),) = self._bytes.items()
            free = shutil.disk_usage(self.directory).free
            last = self.latest()
            whole = "Nothing is complete there" if last is None else f"{last} is complete: the same command goes on"
            raise CheckpointFailed(
                f"{self.directory / str(step)} was not written: {reason}. It takes {_size(needed)}, and {_size(free)} "
                f"are free. Make room (checkpointing.keep says how many are kept) or put the --workdir elsewhere. "
                f"{whole}."
            ) from error


def steps_in(directory: Path) -> list[int]:
    """The numbers of the complete trees of a store that is not open, in their order."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal()) if directory.is_dir() else []


def damage(folder: Path, whole: bool = True) -> str:
    """What is wrong with the files of the tree in `folder`, by their sums; "" for nothing. It reads all of them, or,
    where not `whole`, the small ones alone: document and metric, without which the store can't be opened."""
    if folder.is_dir() and not (folder / _SUMS).exists():
        return f"{folder} has no {_SUMS}: an earlier version of this program wrote it, or a file is lost"
    try:
        sums = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
        for name, (size, crc) in sums.items():
            now = (folder / name).stat().st_size
            if now != size:
                return f"{folder / name} has {now:,} bytes, and {size:,} were written"
            if (whole or size < _SMALL) and _sum(folder / name) != crc:
                return f"{folder / name} does not hold the bytes that were written"
        document_of(folder)
    except OSError as error:
        return f"{error.filename or folder} can't be read ({error.strerror})"
    except (ValueError, TypeError, AttributeError):
        return f"{folder} has a broken {_SUMS} or document"
    return ""


def document_of(folder: Path) -> dict:
    """The document of the tree in `folder`. Raises OSError, ValueError."""
    return json.loads((folder / _DOCUMENT / _DOCUMENT_FILE).read_text(encoding="utf-8"))


def _sum(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with open(file, "rb", buffering=0) as opened:
        while piece := opened.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def _rank(metrics: dict) -> tuple[float, int]:
    """The highest metric is the best, and the earlier step of equal ones."""
    return metrics["metric"], -metrics["step"]


def _reason(error: BaseException | None) -> str:
    """What went wrong on the disk, or with another process's part; "" for any other error. A process whose write failed
    waits for the others before it says so, so that the cause may be behind a barrier's time-out."""
    while error is not None:
        text = str(error).strip()
        if any(sign in text.lower() for sign in _FULL):
            return re.sub(r"\s*\[[^]]*\]$", "", text.splitlines()[0].rsplit(": ", 1)[-1])
        if isinstance(error, OSError):
            return error.strerror or text.rstrip(".")
        error = error.__cause__ or error.__context__
    return ""


def plain(value: Any) -> Any:
    """As it comes back from JSON, which has no NaN; a copy."""
    return json.loads(json.dumps(value, allow_nan=False))


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, in the order of the tree."""
    paths, _ = jax.tree.flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    if len(named) < len(paths):
        raise ValueError("two leaves of the state have the same dotted path")
    return named


def _savable(leaf: Any) -> jax.Array | np.ndarray:
    if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
        return leaf
    if isinstance(leaf, (bool, int, float)):
        return np.array(leaf, jax.dtypes.canonicalize_dtype(np.result_type(leaf)))
    array = np.asarray(leaf)  # copied by Orbax before the save returns
    if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
        raise ValueError(f"a leaf of the state is {array.dtype}, which JAX would not restore")
    return array


def _kind(array: Any) -> str:
    return f"{np.dtype(array.dtype).name}[{','.join(map(str, array.shape))}]"


def difference(before: dict, after: dict, old: str, new: str) -> str:
    """A line for each key with other values, at most 20."""
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if key not in before:
            lines.append(f"  {key}: not in the {old} one -> {after[key]!r}")
        elif key not in after:
            lines.append(f"  {key}: {before[key]!r} -> not in the {new} one")
        elif before[key] != after[key]:
            lines.append(f"  {key}: {before[key]!r} -> {after[key]!r}")
    more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n".join(lines[:20] + more)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
