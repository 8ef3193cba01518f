"""Runs a command and ends it when the process that asked for it is gone, however that one ended.

Usage: python guard.py PARENT_PID COMMAND...   (as the leader of a process group of its own)

The command runs in the guard's process group; the whole group ends with it. Standard library only: it is run by path.
"""

import os
import signal
import subprocess
import sys
import time

GRACE_S = 5.0


def main(parent: int, command: list[str]) -> int:
    group = os.getpgrp()
    signal.signal(signal.SIGTERM, lambda *_: None)  # goes to the whole group; the guard waits for the command's end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command)
    while child.poll() is None:
        if os.getppid() != parent:
            os.killpg(group, signal.SIGTERM)
            give_up = time.monotonic() + GRACE_S
            while child.poll() is None and time.monotonic() < give_up:
                time.sleep(0.1)
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.2)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
