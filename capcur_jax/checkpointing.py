"""Checkpoints of a run, by Orbax: written beside the training, complete or not there at all, restored on any mesh."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from capcur_jax.errors import InputError

_ARRAYS, _DOCUMENT = "arrays", "document"
_TEMPORARY = "*.orbax-checkpoint-tmp*"
_REPLACED = "replaced-"
# What a full disk, a quota or a file-size limit looks like, from Python and from TensorStore.
_FULL = ("no space left", "quota exceeded", "file too large", "resource_exhausted")

# Orbax reports progress and, with its traceback, each failure that is raised here again.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class CheckpointFailed(InputError):
    """A checkpoint could not be written; what was complete before it still is."""


class Checkpoints:
    """Checkpoints of a run in `directory`, the last `keep` and the best. With several processes, all of them call every
    method, in the same order, and share the file system.

    A checkpoint holds a pytree of arrays and a JSON document. Its directory gets its name when all of it is written, so
    that a killed run leaves nothing that looks like one; leftovers go when the next run opens the directory. For a
    moment a checkpoint more than is kept lies on the disk.

    Args:
      directory: where they lie, one directory a step; made if it does not exist.
      keep: the last so many are kept, and the best by metric besides.
      config: the resolved config of the run in plain JSON types, written with each.
      timeout: seconds that writing one may take. When one process of several fails, the others learn of it then.
    """

    def __init__(self, directory: Path, *, keep: int, config: dict, timeout: int = 1200):
        if keep < 1:
            raise InputError(f"checkpointing.keep = {keep}: at least the last checkpoint has to be kept")
        self.directory = Path(directory).absolute()
        self._config = _plain(config)
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False)
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        self._steps = _Store(self.directory, kept, timeout)
        self._references = _Store(self.directory / "reference", policies.LatestN(), timeout)
        self._reference: int | None = None  # the number of the one in use

    def save(self, step: int, state: Any, position: dict, *, metric: float | None = None, wait: bool = False) -> None:
        """Writes a checkpoint in the background; returns when the arrays are copied, so they may be donated then.

        A step that is there already is left alone if its position and metric are the same and replaced otherwise; the
        old one stays until the new one is complete.

        Args:
          step: updates made so far; none may be there that is later.
          state: pytree of arrays. In a run of several processes, an array on the devices of one of them alone (or of
            numpy) has to be the same in all.
          position: the rest of what a continuation needs, as JSON.
          metric: of a validation at this step, higher is better.
          wait: returns when it is complete.

        Raises:
          CheckpointFailed: this one or the one before was not written.
        """
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f"the metric of step {step} is {metric}")
        self._settle()
        last = self._steps.latest()
        if last is not None and last > step:
            raise InputError(
                f"{self.directory} has a checkpoint of step {last}, later than step {step}, which is to be saved. "
                f"Delete what is later to go on from there, or use another --workdir."
            )
        document = {"position": position, "config": self._config, "metric": metric, "reference": self._reference}
        if last == step:
            stored = self._steps.document(step)
            if all(stored[key] == _plain(document)[key] for key in ("position", "metric", "reference")):
                return
            self._steps.set_aside(step)
        self._steps.save(step, state, document, metric)
        if wait:
            self._settle()

    def latest(self) -> int | None:
        """The last step with a complete checkpoint."""
        self._settle()
        return self._steps.latest()

    def best(self) -> tuple[int, float] | None:
        """The step with the highest metric, the later one of equals, and the metric."""
        self._settle()
        return self._steps.best()

    def position(self, step: int) -> dict:
        """What was saved as `position`; nothing else is read."""
        return self._steps.document(step)["position"]

    def config(self, step: int) -> dict:
        """The config with which the step was saved."""
        return self._steps.document(step)["config"]

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step, bit for bit.

        Args:
          step: one that is there.
          abstract: its pytree of jax.ShapeDtypeStruct with the shardings that it shall have, on any mesh. A leaf without
            one comes to this process's first device.

        Raises:
          InputError: no such step, or arrays with other names, shapes or dtypes.
        """
        return self._steps.restore(step, abstract)

    def save_reference(self, name: str, parameters: Any) -> None:
        """Writes a stage's reference policy and waits for it, before the stage's first checkpoint is saved. That of the
        stage before goes when that checkpoint is complete: until then a continuation may need it.

        Raises:
          CheckpointFailed: it could not be written.
        """
        self._settle()
        number = (self._references.latest() or 0) + 1
        self._references.save(number, parameters, {"name": name})
        self._references.wait()
        self._reference = number

    def restore_reference(self, name: str, abstract: Any) -> Any:
        """The last reference saved under this name; as `restore`."""
        for number in reversed(self._references.all()):
            if self._references.document(number)["name"] == name:
                self._reference = number
                return self._references.restore(number, abstract)
        raise InputError(f"{self._references.directory} holds no reference policy {name!r}")

    def forget_reference(self) -> None:
        """No reference policy is needed any more: the next complete checkpoint takes the stored ones away."""
        self._reference = None

    def _settle(self) -> None:
        """Waits for what is being written, then deletes the references that the latest checkpoint does without."""
        self._steps.wait()
        last, stored = self._steps.latest(), self._references.all()
        if last is None or not stored:
            return
        needed = {self._reference, self._steps.document(last)["reference"]}
        for number in stored:
            if number not in needed:
                self._references.delete(number)

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
          CheckpointFailed: it could not be written.
        """
        try:
            self._settle()
        finally:
            self._steps.close()
            self._references.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


class _Store:
    """Numbered pytrees of arrays in a directory, each with a JSON document: an Orbax manager and what it lacks."""

    def __init__(self, directory: Path, kept: Any, timeout: int):
        self.directory = directory
        self._processes = set(range(jax.process_count()))
        self._prefix = directory.name  # of barriers: two stores may write at the same time
        self._bytes: dict[int, int] = {}
        directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            self._put_back()
        # Every process lists the directory next. With the processes named, Orbax meets at barriers of the coordination
        # service, not at a collective, which it would have to compile.
        ocp.multihost.sync_global_processes(f"{self._prefix}:open", processes=self._processes)
        sharing = ocp.options.MultiprocessingOptions(
            active_processes=self._processes, barrier_sync_key_prefix=self._prefix
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept,
            best_fn=_metric,
            create=False,
            cleanup_tmp_directories=True,
            multiprocessing_options=sharing,
            async_options=ocp.AsyncOptions(timeout_secs=timeout),
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
        document = ocp.JsonCheckpointHandler(multiprocessing_options=sharing)
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

    def best(self) -> tuple[int, float] | None:
        step = self._manager.best_step()
        return None if step is None else (step, _metric(self._manager.metrics(step)))

    def save(self, step: int, tree: Any, document: dict, metric: float | None = None) -> None:
        arrays = {name: _savable(leaf) for name, leaf in _named(tree).items()}
        kinds = {name: _kind(array) for name, array in arrays.items()}
        self._bytes = {step: sum(array.nbytes for array in arrays.values())}
        items = ocp.args.Composite(
            **{
                _ARRAYS: ocp.args.PyTreeSave(arrays),
                _DOCUMENT: ocp.args.JsonSave(_plain({**document, "arrays": kinds})),
            }
        )
        with self._explained():
            self._manager.save(
                step, args=items, metrics=None if metric is None else {"metric": float(metric)}, force=True
            )

    def wait(self) -> None:
        """Until what is being written is complete; raises what went wrong, once."""
        with self._explained():
            self._manager.wait_until_finished()
        if jax.process_index() == 0:
            for old in self.directory.glob(_REPLACED + "*"):
                shutil.rmtree(old)

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
                + _difference(stored, kinds, "checkpoint", "config")
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

    def set_aside(self, step: int) -> None:
        """Takes a step away under a name that `_put_back` knows, until another one of that number is complete."""
        if jax.process_index() == 0:
            path = self.directory / str(step)
            path.rename(path.with_name(_REPLACED + path.name))
        self.delete(step)  # from the manager's list

    def _put_back(self) -> None:
        for old in self.directory.glob(_REPLACED + "*"):
            new = old.with_name(old.name.removeprefix(_REPLACED))
            if new.exists():
                shutil.rmtree(old)
            else:
                old.rename(new)

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
                self._put_back()
            self._manager.reload()
            if not isinstance(error, OSError) and not any(text in str(error).lower() for text in _FULL):
                raise
            ((step, needed),) = self._bytes.items()
            free = shutil.disk_usage(self.directory).free
            last = self.latest()
            raise CheckpointFailed(
                f"{self.directory / str(step)} was not written: {str(error).strip().splitlines()[0]}\n"
                f"It takes {_size(needed)} and {_size(free)} are free there. Make room, lower checkpointing.keep or put "
                f"the --workdir elsewhere; "
                + (
                    "nothing is complete there yet."
                    if last is None
                    else f"{last} is complete: the same command goes on."
                )
            ) from error


def check_same_config(stored: dict, now: dict, may_change: tuple[str, ...]) -> None:
    """Refuses to go on with a run under another config.

    Args:
      stored: the config with which it was saved, as it comes out of JSON.
      now: today's.
      may_change: dotted keys that may differ, with all below them.

    Raises:
      InputError: other keys differ; lists them with both values.
    """
    before, after = _flat(_plain(stored)), _flat(_plain(now))

    def fixed(values: dict) -> dict:
        return {key: value for key, value in values.items() if not f"{key}.".startswith(allowed)}

    allowed = tuple(f"{key}." for key in may_change)
    difference = _difference(fixed(before), fixed(after), "stored", "now")
    if difference:
        raise InputError(
            f"this run was started with another config (stored -> now):\n{difference}\n"
            f"Give it the config it was started with, or another --workdir."
        )


def truncate_records(path: Path, offset: int) -> None:
    """Cuts a JSON-lines file to its first `offset` bytes: what follows was recorded after the checkpoint, and will be
    once more. A file that is not there has none.

    Raises:
      InputError: it is shorter, or no record ends there.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < offset:
        raise InputError(
            f"{path} has {size} bytes, but {offset} when the checkpoint was saved: records are lost. Put the file back, "
            f"or start anew with another --workdir."
        )
    if not size:
        return
    with open(path, "rb+") as file:
        file.seek(max(offset - 1, 0))
        if offset and file.read(1) != b"\n":
            raise InputError(
                f"{path}: no record ends at byte {offset}, where the checkpoint has it. Put the file back, or start "
                f"anew with another --workdir."
            )
        file.truncate(offset)


def _metric(metrics: dict) -> float:
    return metrics["metric"]


def _plain(value: Any) -> Any:
    """As it comes back from JSON; a copy."""
    return json.loads(json.dumps(value))


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
    array = np.array(leaf)  # a copy: the caller may go on writing to his
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


def _kind(array: Any) -> str:
    return f"{np.dtype(array.dtype).name}[{','.join(map(str, array.shape))}]"


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _difference(before: dict, after: dict, old: str, new: str) -> str:
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
