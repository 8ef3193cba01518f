"""The environment that tests and the processes that they start run in: set before jax is imported.

One cache of compiled programs for all of them, which outlasts the run (JAX_COMPILATION_CACHE_DIR names another place);
programs hardly optimised, since values are compared here and hardly anything is timed; the CPU, whatever else there is
(JAX_PLATFORMS names another platform). Processes that tests start don't find PyTorch: only parity tests need it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import sys
from pathlib import Path

# For processes that compute together. Without the fusion emitters programs have many small pieces. Now and then their
# collectives begin in another order in each process, and wait for each other for ever: the replay of tests/devices hung
# in 4 of 11 tries, and with the emitters in none of 10.
TOGETHER = {"XLA_FLAGS": ""}
MOST_BYTES = 2**30  # of the cache: what no test asks for any more is never read again
CHILDREN = str(Path(__file__).parent / "children")  # on the path of the processes that tests start


def prepare() -> None:
    """Sets the variables that are not set yet."""
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(_cache()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Half of the time to compile is LLVM's, most of the rest is the fusion emitters'.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
        "CAPCUR_CHECK_SHAPES": "1",  # public functions check the shapes that they declare (axes.py)
        "OMP_WAIT_POLICY": "PASSIVE",  # torch's idle threads that spin take the cores from JAX
    }.items():
        os.environ.setdefault(name, value)
    os.environ["CAPCUR_TESTS"] = sys.prefix
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([CHILDREN, *(one for one in path if one not in ("", CHILDREN))])
    # A worker of pytest-xdist was started as they are, and has the parity tests.
    getattr(sys.modules.get("sitecustomize"), "HIDDEN", set()).clear()
    # A shell starts what runs in its background with Ctrl-C ignored, and what that starts inherits it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _cache() -> Path:
    """Of this kind of CPU: a program compiled for another one may use instructions that this one lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        kind = platform.processor()
    kind = hashlib.sha256(f"{platform.machine()} {kind}".encode()).hexdigest()[:12]
    return Path("~/.cache/capcur_jax").expanduser() / f"test-programs-{kind}"


def tidy() -> None:
    """Empties a cache that has grown too large, and drops entries that a killed process has not written to their end.

    jax writes an entry in place. It compiles what it can't read, but never writes that entry again.
    """
    from jax._src.compilation_cache import decompress_executable

    directory = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    entries = [(path, path.stat()) for path in directory.glob("*-cache")] if directory.is_dir() else []
    if sum(status.st_size for _, status in entries) > MOST_BYTES:
        shutil.rmtree(directory)
        return
    checked = directory / "checked"  # its time: up to when entries were whole
    since = checked.stat().st_mtime if checked.exists() else 0.0
    for path, status in entries:
        if status.st_mtime >= since:
            try:
                decompress_executable(path.read_bytes())
            except Exception:  # of zlib or zstandard, whichever there is
                path.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    checked.touch()
