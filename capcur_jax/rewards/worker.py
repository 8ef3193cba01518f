"""Compare a predicted formula with the gold one (symbolic.py), in a process that its parent may kill at any time.

The program behind `grade.Grader`. Its requests and replies, one of `workers.serve`'s lines each:

    parent: {"gold": "\\frac{1}{2}", "predicted": "0.5"}
    worker: {"equal": true, "last": false}          (last: it has grown too large, and ends)

sympy can hang, and fill the memory, on a few characters of a model's output (`9^{9^{9^9}}`), inside C code that no
signal handler interrupts: the parent's clock kills.
"""

import logging
import os
import resource
import sys
from typing import Any

from capcur_jax import workers
from capcur_jax.rewards import symbolic

# No part of grading does these. The parser does not evaluate text as Python today; if that changes, this still holds.
_FORBIDDEN_EVENTS = (
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.link",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.system",
    "os.truncate",
    "socket.__new__",
    "subprocess.Popen",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _forbid(event: str, args: tuple) -> None:
    """Audit hook: refuses other programs, sockets and every write to the file system."""
    if event in _FORBIDDEN_EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & _WRITING):
        raise PermissionError(f"the grader's worker does not allow {event}")


def _is_bloated(memory_mb: int) -> bool:
    """Whether so much memory was taken that the next, innocent request may fail for want of it."""
    return _peak_bytes() > memory_mb * 2**20 // 2


def _peak_bytes() -> int:
    """Peak resident memory of this program. Not getrusage on Linux: there a new program starts with the peak of the
    one that started it, and a trainer of gigabytes would make every worker look bloated."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def _prepare() -> None:
    """Imports the slow libraries once, and closes what is left open to them."""
    symbolic.equal("x+1", "1+x")  # imports and warms up, so that the first request's time is its own
    logging.disable(logging.CRITICAL)
    sys.dont_write_bytecode = True
    sys.addaudithook(_forbid)


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], None]:
    try:
        equal = symbolic.equal(request["predicted"], request["gold"])
    except MemoryError:
        os._exit(3)  # a fresh process is the only clean state; the parent counts the failure
    except Exception:  # sympy raises anything on odd input: not comparable is not equal
        equal = False
    return {"equal": equal, "last": _is_bloated(memory_mb=int(sys.argv[1]))}, None


if __name__ == "__main__":
    workers.serve(_answer, _prepare)
