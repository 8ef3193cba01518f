"""Installs SGLang's server for hosts without a GPU, in an environment of its own, and prints that environment's Python.

    python launch/sglang_cpu.py [--directory DIR]

The tests marked `sglang` and the CPU rows of the benchmarks run this very server. A GPU host needs none of it: there
the extra `sglang` of setup.py, in an environment of its own, is SGLang as published.

The published wheels ask for CUDA builds of a dozen packages, which nothing needs on a CPU. So the packages of
sglang_cpu.txt below its line `# without dependencies` are installed as they are; what they import stands above it, all
of it pinned. Two adjustments make them importable (see `adjust`).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

PINS = Path(__file__).with_suffix(".txt")
MARK = "# without dependencies"
STAMP = "capcur_jax.installed"
# What a server imports before it listens, and both families' model classes.
CHECK = """
import importlib
for name in (
    "launch_server", "srt.entrypoints.http_server", "srt.managers.scheduler", "srt.managers.detokenizer_manager",
    "srt.models.qwen2_5_vl", "srt.models.qwen3_vl", "srt.multimodal.processors.qwen_vl",
):
    importlib.import_module("sglang." + name)
"""
KERNELS = '''"""Stands in for SGLang's CUDA kernels: every name can be imported, and raises when it is called."""
import torch

__version__ = "0.4.10"  # what sglang asks for at least


class Missing:
    def __init__(self, name):
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(self.__name__ + " is a CUDA kernel; this environment has none")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing(name)


# These are taken from torch.ops while modules are imported. Others are only probed for, and must stay absent.
for name in (
    "fused_gdn_gating_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
):
    if not hasattr(torch.ops.sgl_kernel, name):
        setattr(torch.ops.sgl_kernel, name, Missing(name))
'''
STATE_SPACE_KERNELS = '''"""As the package."""
from sgl_kernel import __getattr__  # noqa: F401
'''


def default_directory() -> Path:
    return Path(os.environ.get("CAPCUR_SGLANG_ENV") or Path.home() / ".cache" / "capcur_jax" / "sglang-cpu")


def install(directory: Path) -> Path:
    """The environment's Python, after installing where it is absent, incomplete or of other pins.

    Raises SystemExit naming what failed; what is there then is replaced by the next call.
    """
    directory = directory.expanduser().absolute()
    python, stamp = directory / "bin" / "python", directory / STAMP
    with locked(directory.with_name(directory.name + ".lock")):
        if stamp.is_file() and stamp.read_text() == fingerprint():
            say(f"{directory} is installed already")
            return python
        if directory.exists():
            if any(directory.iterdir()) and not (directory / "pyvenv.cfg").is_file():
                sys.exit(f"{directory} holds something else than a Python environment; choose another --directory")
            say(f"{directory} is unfinished or has other pins: removing it")
            shutil.rmtree(directory)
        say(f"an environment of Python {sys.version.split()[0]} in {directory}; about 2.3 GB and two minutes")
        venv.create(directory, with_pip=True)
        above, below = pins()
        for packages, options in ((above, []), (below, ["--no-deps"])):
            say(f"pip installs {len(packages)} packages {' '.join(options)}")
            run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options, *packages])
        adjust(python)
        say("importing the server")
        run([python, "-c", CHECK], SGLANG_USE_CPU_ENGINE="1")
        stamp.write_text(fingerprint())
    return python


def pins() -> tuple[list[str], list[str]]:
    """The requirements to install with and without what they depend on."""
    lines = [line.strip() for line in PINS.read_text().splitlines()]
    middle = lines.index(MARK)
    return tuple([line for line in part if line and line[0] != "#"] for part in (lines[:middle], lines[middle:]))


def fingerprint() -> str:
    """A digest of what decides the installation: the pins, the stand-ins and Python's version."""
    return hashlib.sha256("".join([PINS.read_text(), KERNELS, STATE_SPACE_KERNELS, sys.version]).encode()).hexdigest()


def adjust(python: Path) -> None:
    """Makes importable on a CPU what was built for CUDA."""
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    # Registers shapes for torchvision's compiled operators, which a CUDA build cannot load here; images need none.
    (packages / "torchvision" / "_meta_registrations.py").write_text(
        "# Emptied: the operators are not there on a CPU.\n"
    )
    kernels = packages / "sgl_kernel"
    kernels.mkdir()
    (kernels / "__init__.py").write_text(KERNELS)
    (kernels / "mamba.py").write_text(STATE_SPACE_KERNELS)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Only one process at a time is past this; the system lets go of the lock of one that ends, its pip included."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as opened:
        os.set_inheritable(opened.fileno(), True)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process installs (it holds {file}): waiting for it")
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def run(command: list, **environment: str) -> None:
    # Output goes to stderr: the last line on stdout is the result.
    if subprocess.run(command, stdout=sys.stderr, env=os.environ | environment, close_fds=False).returncode:
        sys.exit("failed: " + " ".join(map(str, command))[:400])


def say(text: str) -> None:
    print("sglang_cpu: " + text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Installs SGLang's server for a CPU in an environment of its own.")
    parser.add_argument("--directory", type=Path, default=default_directory(), help="default: %(default)s")
    print(install(parser.parse_args().directory))
