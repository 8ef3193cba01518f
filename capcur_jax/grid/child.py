"""Starts a run of the grid with its share of the machine: python -m capcur_jax.grid.child PARENT CORES COMMAND...

CORES is a list like 0,1; "" takes all. The run ends with the grid that started it, however that ends: on Linux the
kernel kills it, and the same grid goes on with it. So no run is left behind that would hold its directory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, cores, command = int(arguments[0]), arguments[1], arguments[2:]
    # Slurm sends a job's signals to all of its processes. These two are for the one that started this (slurm.py).
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            sys.exit(1)
        if cores:
            os.sched_setaffinity(0, set(map(int, cores.split(","))))
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
