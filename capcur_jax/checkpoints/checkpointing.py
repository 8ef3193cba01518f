"""Checkpoints of a run: what they hold, which are kept, and what a continuation checks before it uses one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

from capcur_jax.checkpoints.store import CheckpointFailed, Store, damage, difference, document_of, plain, steps_in
from capcur_jax.devices import distributed
from capcur_jax.errors import InputError
from capcur_jax.records.jsonl import read_jsonl

__all__ = ["CheckpointFailed", "Checkpoints", "Progress", "check_same_config", "truncate_records"]


RECORDS = ("metrics.jsonl", "rollouts.jsonl")  # of a run that goes on: as long as its checkpoint says


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: the part of a checkpoint that is not arrays. train.py alone replaces a run's."""

    stage: int = 0  # number in config.order
    stage_step: int = 0  # steps of it that are done
    batches: int = 0  # rollout batches of it that were consumed
    step: int = 0  # steps of the whole run
    version: int = 0  # of the weights: updates of the whole run
    skipped: int = 0  # updates left out in the stages before; the state counts those of this one
    best: float | None = None  # validation accuracy
    seconds: float = 0.0  # that the run has taken when this was saved

    @property
    def number(self) -> int:
        """The number of the checkpoint that holds this. It counts stages, too: a stage's start and the end of the stage
        before are at the same step, and each has a checkpoint."""
        return self.step + self.stage

    def before(self, number: int) -> int:
        """Steps that were done before stage `number`, which is this one or the next."""
        return self.step - self.stage_step if self.stage == number else self.step

    def begin_stage(self, number: int, skipped: int) -> Progress:
        return dataclasses.replace(self, stage=number, stage_step=0, batches=0, skipped=skipped)

    def after_step(self, updates: int, batches: int) -> Progress:
        """One step further, which made so many updates from so many rollout batches."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            stage_step=self.stage_step + 1,
            version=self.version + updates,
            batches=self.batches + batches,
        )


class Checkpoints:
    """Checkpoints of a run in `directory`, the last `keep` and the best. With several processes, all of them call every
    method, in the same order, and share the file system.

    A checkpoint holds a pytree of arrays and a JSON document. Its directory gets its name when all of it is written, so
    that a killed run leaves nothing that looks like one; leftovers go when the next run opens the directory. For a
    moment one checkpoint more than `keep` lies on the disk. Where the last one, or its reference policy, is not as it
    was written, it is set aside, and the one before it is the last.

    Args:
      directory: where they lie, one directory a step; made if it does not exist.
      keep: how many of the last ones are kept, besides the best by metric.
      timeout: seconds that writing one may take. When one process of several fails, the others learn of it then.

    Attributes:
      set_aside: what was found damaged, a line each, and where it lies now.

    Raises:
      InputError: there are checkpoints, and all of them are damaged; they stay where they are.
    """

    def __init__(self, directory: Path, *, keep: int, timeout: int = 1200):
        if keep < 1:
            raise InputError(f"checkpointing.keep = {keep}: at least the last checkpoint has to be kept")
        self.directory = Path(directory).absolute()
        self._keep = keep
        self.set_aside = self._set_aside_damaged()
        # Of each checkpoint the number of its reference, as far as it is known: an old one may be damaged, too.
        self._references_of: dict[int, int | None] = {}
        for step in steps_in(self.directory):
            with contextlib.suppress(OSError, ValueError):
                self._references_of[step] = document_of(self.directory / str(step))["reference"]
        self._steps = Store(self.directory, keep, timeout)
        self._references = Store(self.directory / "reference", None, timeout)
        self._reference: int | None = None  # the number of the one in use

    def _set_aside_damaged(self) -> list[str]:
        found: dict[int, str] = {}  # the damage of each step, the last one first
        steps, sound = steps_in(self.directory) if distributed.is_owner() else [], False
        for step in reversed(steps):  # all bytes of the one that is taken; of older ones what opening the store reads
            if wrong := self._damage(self.directory / str(step), whole=not sound):
                found[step] = wrong
            else:
                sound = True
        lost = bool(steps) and not sound
        if distributed.agree(lost):
            listed = "\n".join(f"  {step}: {wrong}" for step, wrong in found.items())
            raise InputError(
                f"no checkpoint in {self.directory} is as it was written:\n{listed}\n"
                "Put the files back, or start anew with another --workdir."
            )
        lines = []
        for step, wrong in found.items():
            aside = self.directory / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)
            lines.append(f"checkpoint {step} is damaged: {wrong}. It lies in {aside} now, and is not used")
        distributed.barrier("damaged")
        return lines

    def _damage(self, folder: Path, whole: bool) -> str:
        """What is wrong with a checkpoint, or with the reference policy that it needs; see `damage`."""
        if wrong := damage(folder, whole):
            return wrong
        reference = document_of(folder)["reference"] if whole else None
        return "" if reference is None else damage(self.directory / "reference" / str(reference))

    def save(self, step: int, state: Any, position: dict, *, metric: float | None = None, wait: bool = False) -> None:
        """Writes a checkpoint in the background; returns when the arrays are copied, so they may be donated then.

        Args:
          step: its number, higher than those that are there.
          state: pytree of arrays. In a run of several processes, an array on the devices of one of them alone (or of
            numpy) has to be the same in all.
          position: the rest of what a continuation needs, as JSON.
          metric: of a validation at this step, higher is better.
          wait: returns when it is complete.

        Raises:
          CheckpointFailed: this one or the one before was not written.
          InputError: this number or a later one is there.
        """
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f"the metric of step {step} is {metric}")
        self._settle()
        last = self._steps.latest()
        if last is not None and last >= step:
            raise InputError(
                f"{self.directory} has a checkpoint of step {last}, and step {step} is to be saved. Delete what is not "
                f"before it to go on from there, or use another --workdir."
            )
        self._references_of[step] = self._reference
        self._steps.save(step, state, {"position": position, "reference": self._reference}, metric)
        if wait:
            self._settle()

    def save_run(
        self, progress: Progress, state: Any, sizes: dict[str, int], *, metric: float | None = None, wait: bool = False
    ) -> None:
        """A checkpoint from which the run goes on; as `save`.

        Args:
          sizes: of its record files, in bytes.
        """
        position = {"progress": dataclasses.asdict(progress), "bytes": sizes}
        self.save(progress.number, state, position, metric=metric, wait=wait)

    def progress(self, step: int) -> tuple[Progress, dict[str, int]]:
        """What `save_run` was given. Raises InputError for a checkpoint of another version of this program."""
        stored = self.position(step)
        try:
            return Progress(**stored["progress"]), stored["bytes"]
        except (KeyError, TypeError):
            raise InputError(
                f"{self.directory / str(step)} was written by another version of this program: go on with that "
                f"version, or start anew with another --workdir."
            ) from None

    def holds(self, progress: Progress) -> bool:
        """Whether the last complete checkpoint is of this very progress, at whatever second it was saved."""
        last = self.latest()
        return last is not None and dataclasses.replace(self.progress(last)[0], seconds=progress.seconds) == progress

    def latest(self) -> int | None:
        """The last step with a complete checkpoint."""
        self._settle()
        return self._steps.latest()

    def position(self, step: int) -> dict:
        """What was saved as `position`; nothing else is read."""
        self._settle()
        return self._steps.document(step)["position"]

    def restore(self, step: int, abstract: Any) -> Any:
        """The state of a step, bit for bit.

        Args:
          step: one that is there.
          abstract: its pytree of jax.ShapeDtypeStruct with the shardings that it is to have, on any mesh. A leaf
            without one comes to this process's first device.

        Raises:
          InputError: no such step, or arrays with other names, shapes or dtypes.
        """
        self._settle()
        return self._steps.restore(step, abstract)

    def save_reference(self, name: str, parameters: Any) -> None:
        """Writes a stage's reference policy and waits for it, before the stage's first checkpoint is saved. That of the
        stage before goes with the last of the `keep` checkpoints that a continuation would need it for.

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

    def clear(self) -> None:
        """Removes the checkpoints."""
        self._settle()
        for step in self._steps.all():
            self._steps.delete(step)

    def _settle(self) -> None:
        """Waits for what is being written, then deletes the references that the last checkpoints do without."""
        self._steps.wait()
        last = self._steps.all()[-self._keep :]
        if not last:
            return
        needed = {self._reference, *(self._references_of.get(step) for step in last)}
        for number in self._references.all():
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


def check_same_config(stored: dict, now: dict, may_change: tuple[str, ...]) -> None:
    """Refuses to go on with a run under another config.

    Args:
      stored: the config with which it was saved, as it comes out of JSON.
      now: today's.
      may_change: dotted keys that may differ, with everything below them.

    Raises:
      InputError: other keys differ; lists them with both values.
    """
    before, after = _flat(plain(stored)), _flat(plain(now))

    def fixed(values: dict) -> dict:
        return {key: value for key, value in values.items() if not f"{key}.".startswith(allowed)}

    allowed = tuple(f"{key}." for key in may_change)
    changes = difference(fixed(before), fixed(after), "stored", "new")
    if changes:
        raise InputError(
            f"this run was started with another config (stored -> new):\n{changes}\n"
            f"Give it the config it was started with, or another --workdir."
        )


def start_anew(workdir: Path, owner: bool) -> Progress:
    """Removes what a run left that was stopped before its first checkpoint. All processes call it together.

    Raises:
      InputError: steps were recorded: their checkpoints were taken away.
    """
    records = workdir / "metrics.jsonl"
    if records.exists() and any(record["type"] == "step" for record in read_jsonl(records)):
        raise InputError(
            f"{workdir} holds the records of a run but no checkpoint in {workdir / 'state'}: put them back, or give "
            f"another --workdir"
        )
    distributed.barrier("read")  # no process reads a file that the owner has deleted
    if owner:
        for name in RECORDS:
            (workdir / name).unlink(missing_ok=True)
        shutil.rmtree(workdir / "skeleton", ignore_errors=True)  # a corrected config may want another one
    distributed.barrier("anew")
    return Progress()


def go_on(workdir: Path, owner: bool, checkpoints: Checkpoints, number: int) -> Progress:
    """Where checkpoint `number` left the run: its records end there, too. All processes call it together."""
    progress, sizes = checkpoints.progress(number)
    if owner:
        for name, size in sizes.items():
            truncate_records(workdir / name, size)
    distributed.barrier("records")
    return progress


def record_sizes(workdir: Path) -> dict[str, int]:
    """Bytes of the record files now."""
    return {name: (workdir / name).stat().st_size for name in RECORDS if (workdir / name).exists()}


def truncate_records(path: Path, offset: int) -> None:
    """Cuts a JSON-lines file to its first `offset` bytes: what follows was recorded after the checkpoint, and will be
    recorded again. A file that is not there has none.

    Raises:
      InputError: it is shorter, or no record ends there.
    """
    size = path.stat().st_size if path.exists() else 0
    if size < offset:
        raise InputError(
            f"{path} has {size} bytes, but {offset} when the checkpoint was saved: records are lost. Put the file "
            f"back, or start anew with another --workdir."
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


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; a list of dicts is told apart by number."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat
