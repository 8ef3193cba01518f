"""Where the runs of a grid take place. An executor starts commands and says how many it takes side by side."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from capcur_jax.errors import InputError
from capcur_jax.grid.slurm import Slurm


class Running(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        ...

    def stop(self) -> None:
        """Asks it to save and end, as Ctrl-C would."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...


class Executor(Protocol):
    """Takes up to `width` commands side by side."""

    width: int

    def start(self, command: Sequence[str], log: Path) -> Running:
        """Starts a command of this project's folder; what it says is appended to `log`."""
        ...

    def together(self) -> contextlib.AbstractContextManager[None]:
        """What is started in here may be sent as one; it has been when this ends."""
        ...


class _Process:
    """A local process. `share`: its place in the executor, given back when it ended."""

    def __init__(self, process: subprocess.Popen, share: int, free: list[int]):
        self._process, self._share, self._free = process, share, free

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and self._share >= 0:
            self._free.append(self._share)
            self._share = -1
        return code

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Local:
    """Processes of this machine, whose cores and GPUs are shared out evenly.

    Raises:
      InputError: fewer cores or GPUs than `jobs`.
    """

    def __init__(self, jobs: int):
        self.width = jobs
        cores = list(range(os.cpu_count() or 1))
        if hasattr(os, "sched_getaffinity"):
            cores = sorted(os.sched_getaffinity(0))
        parts = zip(shared(cores, jobs, "core"), _gpus(jobs), strict=True)
        self._shares = [_environment(mine, gpus) for mine, gpus in parts]
        self._free = list(range(jobs))

    def start(self, command: Sequence[str], log: Path) -> Running:
        log.parent.mkdir(parents=True, exist_ok=True)
        share = self._free[0]
        cores, environment = self._shares[share]
        own = [sys.executable, "-m", "capcur_jax.grid.child", str(os.getpid()), cores, *command]
        with log.open("ab") as file:
            process = subprocess.Popen(
                own, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is for the grid, which stops its runs itself
            )  # fmt: skip
        self._free.remove(share)
        return _Process(process, share, self._free)

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


EXECUTORS = ("local", "slurm")


def executor(name: str, jobs: int, folder: Path, settings: Sequence[str]) -> Executor:
    """By its name. `settings`: KEY=VALUE of a cluster's jobs; `folder`: for its files. Raises InputError."""
    if name == "slurm":
        return Slurm(jobs, folder, settings)
    if settings:
        raise InputError(f"--slurm={settings[0]} needs --executor=slurm")
    return Local(jobs)


def shared(things: Sequence[int], jobs: int, what: str) -> list[list[int]]:
    """Neighbours together, shares as even as can be. Raises InputError where there is none for each."""
    if len(things) < jobs:
        raise InputError(f"--jobs={jobs}, but this machine has {len(things)} {what}s for them; give at most that many")
    ends = [round(number * len(things) / jobs) for number in range(jobs + 1)]
    return [list(things[start:end]) for start, end in itertools.pairwise(ends)]


def _environment(cores: Sequence[int], gpus: Sequence[str] | None) -> tuple[str, Mapping[str, str]]:
    """Cores as the child takes them, and the variables that make libraries start no more threads than those."""
    count = str(len(cores))
    threads = {"NPROC": count, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}  # XLA's pools: NPROC
    return ",".join(map(str, cores)), threads | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)})


def _gpus(jobs: int) -> list[list[str] | None]:
    """The GPUs of each job by what CUDA_VISIBLE_DEVICES calls them; None: there are none to share out."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else sorted(str(file.name[6:]) for file in Path("/dev").glob("nvidia[0-9]*"))
    if jobs == 1 or not names or given == "":
        return [None] * jobs
    return [[names[number] for number in part] for part in shared(range(len(names)), jobs, "GPU")]
