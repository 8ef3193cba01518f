"""Runs of a grid as jobs of Slurm, sent with submitit: what may start together goes as one array.

A job outlives the grid that sent it. The same grid finds it again by the file that lies beside the job's log.

Signals: SIGTERM is Slurm's, to what it preempts, SIGUSR2 comes GRACE_S before the time limit, SIGUSR1 from a grid that
is stopped. After each the run saves and ends; after the first two its job waits to go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capcur_jax.errors import InputError

GRACE_S = 120  # that a run gets to save before its time limit
LOOK_S = 5.0  # between questions to Slurm
LAG_S = 30.0  # that a shared file system may take to show what a job has written
KILLED_S = 600.0  # until a job that is to go on later has been ended by Slurm
RUN = "capcur_jax.main"  # what computes in several tasks together
AGAIN_S = 60.0  # until jobs that Slurm has refused are sent again
LOST = 1  # exit code of a job that ended without one


class Command:
    """What a job runs, in each of its tasks; submitit keeps it with the job."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._preempted = False

    def __call__(self, line: Sequence[str], log: str) -> int:
        """The command's exit code. Never returns in a job that is to go on later."""
        task = int(os.environ.get("SLURM_PROCID", 0))
        if task and RUN not in line:  # a pass rate is measured in one process, whatever nodes the runs take
            return 0
        signal.signal(signal.SIGUSR1, self._stop)
        signal.signal(signal.SIGTERM, self._heard)
        own = [sys.executable, "-m", "capcur_jax.grid.child", str(os.getpid()), "", *line]
        with open(log if task == 0 else f"{log}.{task}", "ab") as file:
            self._process = subprocess.Popen(own, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        code = self._process.wait()
        if self._preempted and code:
            self._later(task)
        return code

    def checkpoint(self, line: Sequence[str], log: str):
        """Called by submitit before the time limit: what it is to send again, once the run has saved."""
        import submitit

        self._stop()
        if self._process is not None:
            with contextlib.suppress(ChildProcessError):  # it has ended
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)  # __call__ is in the middle of a wait
        return submitit.helpers.DelayedSubmission(Command(), line, log)

    def _stop(self, *unused) -> None:
        if self._process is not None:
            self._process.terminate()

    def _heard(self, *unused) -> None:
        self._preempted = True  # Slurm has told the run itself

    def _later(self, task: int) -> None:
        """Sends the job back to the queue and waits for its end. Raises RuntimeError where that doesn't come."""
        if task == 0:  # one that is being sent back already is refused, and that is well
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
        time.sleep(KILLED_S)
        raise RuntimeError("the job was preempted, and Slurm neither sent it back to the queue nor ended it")


class _Job:
    """A job in Slurm, by its id; "" before it is sent."""

    def __init__(self, executor: Slurm, log: Path, line: Sequence[str]):
        self.executor, self.log, self.line, self.id = executor, log, list(line), ""
        self._gone: float | None = None  # since when Slurm does not list it
        self._cancelled = False

    @property
    def note(self) -> Path:
        return self.log.with_name(f"{self.log.name}.job")

    def remember(self) -> None:
        self.note.write_text(json.dumps({"job": self.id, "command": self.line}) + "\n", encoding="utf-8")

    def poll(self) -> int | None:
        if not self.id:  # Slurm has not taken it yet
            return LOST if self._cancelled else None
        listed = self.executor.listed()
        if listed is None or self.id in listed:
            self._gone = None
            return None
        self._gone = self._gone or time.monotonic()
        code = self._result()
        if code is None and time.monotonic() - self._gone < LAG_S and not self._cancelled:
            return None
        self.note.unlink(missing_ok=True)
        return LOST if code is None else code

    def _result(self) -> int | None:
        """What its first task has returned; LOST with the reason in the log; None: nothing is there."""
        import submitit
        from submitit.core.utils import FailedJobError

        job = submitit.SlurmJob(folder=self.executor.folder, job_id=self.id)
        if not job.paths.result_pickle.exists():
            return None
        try:
            return int(job.result())
        except FailedJobError as error:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{error}\n")
            return LOST

    def stop(self) -> None:
        if not self.id or (self.executor.listed(now=True) or {}).get(self.id) == "PENDING":
            self.kill()
        elif self.id:
            _ask("scancel", "--signal=USR1", self.id)

    def kill(self) -> None:
        self._cancelled = True
        if self.id:
            _ask("scancel", self.id)


class Slurm:
    """Jobs of a Slurm cluster.

    Args:
      jobs: how many may wait or run at a time.
      folder: for submitit's files; all nodes see it.
      settings: KEY=VALUE of submitit's parameters, such as partition=gpu, time=600 (minutes), gpus_per_node=8.

    Raises:
      InputError: no submitit, no Slurm, or a setting that there is not.
    """

    def __init__(self, jobs: int, folder: Path, settings: Sequence[str]):
        wanted = parameters(settings)
        try:
            import submitit
        except ImportError:
            raise InputError("--executor=slurm needs submitit: pip install -e '.[slurm]'") from None
        for program in ("sbatch", "squeue", "scancel"):
            if not shutil.which(program):
                raise InputError(f"--executor=slurm: there is no {program} here; start the grid on a login node")
        self.width, self.folder = jobs, folder.absolute()
        self._new: list[_Job] = []  # not sent yet
        self._took, self._again = False, 0.0  # whether Slurm has taken a job before; when it is asked again
        self._asked, self._listed = -LOOK_S, None
        # A run may come to its time limit as often as it likes: each time it has learned something.
        self._executor = submitit.SlurmExecutor(folder=self.folder, max_num_timeout=10**6)
        try:
            self._executor.update_parameters(**wanted)
        except ValueError as error:
            raise InputError(f"--slurm: {error}") from None

    def start(self, command: Sequence[str], log: Path) -> _Job:
        """Finds the job of an earlier grid, or has a new one sent at the end of `together`, or of a later one."""
        log.parent.mkdir(parents=True, exist_ok=True)
        job = _Job(self, log.absolute(), command)
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(job.note.read_text(encoding="utf-8"))
            if found["job"] in (self.listed(now=True) or {}):
                if found["command"] != job.line:
                    raise InputError(
                        f"{log.parent}: job {found['job']} of another command is still in the queue or running; "
                        f"wait for it, or: scancel {found['job']}"
                    )
                job.id, self._took = found["job"], True
                return job
        self._new.append(job)
        return job

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is started in here is sent as one array. Where Slurm refuses it, it is tried again later, as long as the
        grid lives: what runs is not ended for a controller that restarts or a queue that is full. Raises InputError
        where it refuses the first."""
        yield
        self._new = [job for job in self._new if job.poll() is None]  # none that was stopped meanwhile
        if not self._new or time.monotonic() < self._again:
            return
        try:
            sent = self._executor.map_array(
                Command(), [job.line for job in self._new], [str(job.log) for job in self._new]
            )
        except Exception as error:  # submitit raises its own of what sbatch has said
            if not self._took:
                raise InputError(f"--executor=slurm: the jobs can't be sent: {error}") from None
            self._again = time.monotonic() + AGAIN_S
            for job in self._new:
                with job.log.open("a", encoding="utf-8") as file:
                    file.write(f"the job can't be sent, which is tried again in {AGAIN_S:.0f} s: {error}\n")
            return
        for job, made in zip(self._new, sent, strict=True):
            job.id = made.job_id
            job.remember()
        self._new, self._took = [], True
        self.listed(now=True)

    def listed(self, now: bool = False) -> Mapping[str, str] | None:
        """The state of each of the user's jobs that waits or runs; None: Slurm doesn't answer. Asked every LOOK_S."""
        if now or time.monotonic() - self._asked >= LOOK_S:
            self._asked = time.monotonic()
            said = _ask("squeue", "--me", "--noheader", "--array", "--format=%i %T")
            self._listed = None if said is None else dict(line.split(maxsplit=1) for line in said.splitlines())
        return self._listed


def parameters(settings: Sequence[str]) -> dict[str, Any]:
    """As submitit takes them. Raises InputError for what is no KEY=VALUE."""
    found: dict[str, Any] = {
        "job_name": "capcur", "ntasks_per_node": 1, "signal_delay_s": GRACE_S, "time": 24 * 60,
        "additional_parameters": {"requeue": True},
    }  # fmt: skip
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise InputError(f"--slurm={setting}: give KEY=VALUE, such as --slurm=partition=gpu")
        if key in ("signal_delay_s", "use_srun", "map_count"):
            raise InputError(f"--slurm={setting}: the grid sets it itself")
        if key == "time" and not value.isdecimal():
            raise InputError(f"--slurm={setting}: give whole minutes, such as --slurm=time=720")
        if key in ("setup", "srun_args"):
            found.setdefault(key, []).append(value)
        else:
            found[key] = int(value) if value.isdecimal() else value
    return found


def _ask(*command: str) -> str | None:
    """What Slurm says; None where it doesn't answer or refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
