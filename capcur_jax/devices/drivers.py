"""Accelerators that cannot be here: JAX is kept from looking for them."""

from __future__ import annotations

import sys
from pathlib import Path

import jax

# What a driver of an accelerator makes; a TPU's is vfio on new hosts, a GPU's dxg under Windows.
DRIVERS = ("nvidia*", "nvhost*", "nvgpu*", "dxg", "kfd", "accel*", "vfio/*")


def without_drivers_cpu() -> None:
    """Has JAX use the CPU where no accelerator has a driver. To be called before anything asks JAX for a device.

    Compilers for accelerators may be installed where there is none (the extras plan and test). JAX would try each and
    print its traceback. Where there is a driver, that traceback is wanted; JAX_PLATFORMS, where it is set, decides.
    """
    there = any(next(Path("/dev").glob(pattern), None) for pattern in DRIVERS)
    if sys.platform == "linux" and jax.config.jax_platforms is None and not there:
        jax.config.update("jax_platforms", "cpu")
