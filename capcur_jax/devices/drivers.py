"""What JAX is told before it looks for devices: which cannot be here, and where compiled programs are kept."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax

# What a driver of an accelerator makes; a TPU's is vfio on new hosts, a GPU's dxg under Windows.
DRIVERS = ("nvidia*", "nvhost*", "nvgpu*", "dxg", "kfd", "accel*", "vfio/*")
MOST_BYTES = 4 * 2**30  # of kept programs; the least recently used ones go
THREADS = 8  # a device of several, on a CPU: more collectives than one device of ours has under way at once


def keep_programs() -> None:
    """Has JAX keep compiled programs in the user's cache folder, so that the next start reads them.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps none. With a bound on its
    size JAX takes a lock for what it reads and writes: processes may share the folder. What it can't read it compiles.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(home / "capcur_jax" / f"programs-{_cpu()}"))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cpu() -> str:
    """This kind of CPU: a program compiled for another one may use instructions that this one lacks, and hosts may
    share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        kind = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {kind}".encode()).hexdigest()[:12]


def without_drivers_cpu() -> None:
    """Has JAX use the CPU where no accelerator has a driver. To be called before anything asks JAX for a device.

    Compilers for accelerators may be installed where there is none (the extras plan and test). JAX would try each and
    print its traceback. Where there is a driver, that traceback is wanted; JAX_PLATFORMS, where it is set, decides.
    """
    there = any(next(Path("/dev").glob(pattern), None) for pattern in DRIVERS)
    if sys.platform == "linux" and jax.config.jax_platforms is None and not there:
        jax.config.update("jax_platforms", "cpu")


def threads_for_collectives() -> None:
    """Has XLA's pool hold a thread for every collective that may wait. To be called before anything asks JAX for a
    device, where devices of CPUs compute together.

    A collective on a CPU blocks a thread until all devices have come. The pool has as many threads as the host has
    cores: with more devices than cores they may all be blocked by those that wait, and those that they wait for never
    begin. PJRT_NPROC or NPROC, where one is set, decides.
    """
    if "NPROC" not in os.environ:
        most = max(THREADS * max(1, jax.config.jax_num_cpu_devices), os.cpu_count() or 1)
        os.environ.setdefault("PJRT_NPROC", str(most))
