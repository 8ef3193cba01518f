"""A Slurm cluster of this machine: munged, slurmctld and two slurmd, their files in one folder, ended with the test.

It needs Debian's packages slurm-wlm and munge and nothing else: no service, no cgroups, no accounting, no root.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["PATH"] += ":/usr/sbin:/sbin"  # where Debian has the daemons
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "setpriv")
NODES = 2
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={control}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# A task is a process that its parent can find; no cgroups, and cores are not bound.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1
KillWait=60
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 MaxTime=60
"""


def missing() -> str:
    """Why there can be no Slurm here; "" where there can."""
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    return f"needs Debian's slurm-wlm and munge: {', '.join(lacking)} not found" if lacking else ""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """Its slurm.conf, which SLURM_CONF has to name. `folder`: a short path, since sockets lie in it."""
    folder.chmod(0o755)  # munged wants a socket that others can reach
    (folder / "state").mkdir()
    host, user, ports = socket.gethostname().split(".")[0], getpass.getuser(), _free_ports(NODES + 1)
    text = CONFIG.format(host=host, user=user, control=ports[0], folder=folder)
    for number, port in enumerate(ports[1:]):
        text += (
            f"NodeName=127.0.0.{number + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN\n"
        )
    config = folder / "slurm.conf"
    config.write_text(text)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    named = {kind: f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")}
    started: list[subprocess.Popen] = []
    with (folder / "daemons.log").open("ab") as log:

        def start(*command: str) -> None:
            started.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig=KILL", *command],  # they end with this process, also if it is killed
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    env={**os.environ, "SLURM_CONF": str(config)},
                )
            )  # fmt: skip

        try:
            place = f"--socket={folder}/munge.socket"
            start("munged", "--foreground", "--force", "--num-threads=2", place, *named.values())
            _until(lambda: (folder / "munge.socket").exists(), folder)
            start("slurmctld", "-D", "-f", str(config))
            for number in range(NODES):
                start("slurmd", "-D", "-f", str(config), "-N", f"127.0.0.{number + 1}")
            _until(lambda: _idle(config) == NODES, folder)
            yield config
        finally:
            _end_jobs(config)
            for process in reversed(started):
                process.terminate()
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _idle(config: Path) -> int:
    said = _ask(config, "sinfo", "--noheader", "--Node", "--partition=normal", "--format=%t")
    return said.split().count("idle")


def _end_jobs(config: Path) -> None:
    """Cancels what a failed test has left, and waits until its processes have ended."""
    if _ask(config, "squeue", "--noheader"):
        _ask(config, "scancel", "--me", "--full", "--signal=KILL")
        _ask(config, "scancel", "--me")
        until = time.monotonic() + 20
        while _ask(config, "squeue", "--noheader") and time.monotonic() < until:
            time.sleep(0.2)


def _ask(config: Path, *command: str) -> str:
    environment = {**os.environ, "SLURM_CONF": str(config)}
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""


def _until(there, folder: Path, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not there():
        if time.monotonic() > limit:
            logs = [f"----- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*.log")]
            raise RuntimeError("Slurm didn't start\n" + "\n".join(logs))
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in held]
