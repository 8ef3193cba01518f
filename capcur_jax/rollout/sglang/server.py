"""SGLang servers as processes of this host: what they serve, their command line, their start and their end.

A server starts with made-up weights and gets all of them from us, as at every update: whatever it says was made by
weights that the trainer sent. It never outlives the trainer (guard.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from capcur_jax.errors import InputError
from capcur_jax.models.weight_files import WEIGHTS
from capcur_jax.rollout.sglang.settings import WHERE, Settings

MEMORY = Path("/dev/shm")
GUARD = Path(__file__).with_name("guard.py")
UNBOUNDED = {"shortest_edge": 1, "longest_edge": 2**40}  # pixels: no image that comes at the grid's size is resized
# Variables that belong to the trainer's environment and break another Python's.
OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "XLA_FLAGS", "LD_PRELOAD")
# PyTorch's own kernels: SGLang's need a GPU or AMX. An idle server sleeps instead of spinning on the cores.
CPU_FLAGS = (
    "--attention-backend", "torch_native", "--mm-attention-backend", "sdpa", "--sampling-backend", "pytorch",
    "--disable-cuda-graph", "--disable-overlap-schedule", "--sleep-on-idle", "--max-total-tokens", "8192",
    "--max-running-requests", "16",
)  # fmt: skip


def write_served(directory: Path, source: str | Path) -> Path:
    """Writes a model directory without weights from the checkpoint `source`; returns `directory`."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and file.name not in WEIGHTS:
            shutil.copyfile(file, directory / file.name)
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if not (directory / name).is_file():
            continue
        whole = json.loads((directory / name).read_text(encoding="utf-8"))
        images = whole if section is None else whole.get(section)
        if not isinstance(images, dict):
            continue
        images["size"] = dict(UNBOUNDED)
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):  # the older names
            if key in images:
                images[key] = UNBOUNDED[edge]
        (directory / name).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return directory


def command(settings: Settings, model: Path, number: int, port: int, seed: int) -> list[str]:
    """The command line of server `number`."""
    flags: dict[str, Any] = {
        "model-path": model,
        "load-format": "dummy",
        "host": settings.host,
        "port": port,
        "device": settings.device,
        "dtype": settings.dtype,
        "tensor-parallel-size": settings.tensor_parallel,
        "random-seed": seed + number,
        "weight-version": "-1",
    }
    if settings.memory_fraction:
        flags["mem-fraction-static"] = settings.memory_fraction
    line = [settings.python, "-m", "sglang.launch_server"]
    for name, value in flags.items():
        line += [f"--{name}", str(value)]
    line.append("--skip-server-warmup")
    if settings.colocate:
        line.append("--enable-memory-saver")
    if settings.device == "cpu":
        line += CPU_FLAGS
    return [*line, *settings.arguments]


def environment(settings: Settings, number: int, base: Mapping[str, str]) -> dict[str, str]:
    """Variables of server `number`, from the trainer's own (`base`)."""
    found = {name: value for name, value in base.items() if name not in OURS}
    found |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if settings.device == "cpu":
        found |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    else:
        each = settings.tensor_parallel
        gpus = settings.gpus or range(settings.servers * each)
        # Ids count among the GPUs that this process was given, as JAX's do (config.mesh.gpus).
        given = [name for name in base.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        mine = gpus[number * each : (number + 1) * each]
        if given and max(mine) >= len(given):
            raise InputError(
                f"{WHERE}.gpus: id {max(mine)}, but CUDA_VISIBLE_DEVICES={','.join(given)} gives {len(given)}"
            )
        found["CUDA_VISIBLE_DEVICES"] = ",".join(given[gpu] if given else str(gpu) for gpu in mine)
    found |= dict(one.split("=", 1) for one in settings.environment)
    # Last: else image features of old vision weights outlive an update; flushing the cache doesn't clear them.
    return found | {"SGLANG_VLM_CACHE_SIZE_MB": "0"}


def own_servers(settings: Settings, source: str | Path, directory: Path, seed: int) -> list[tuple[str, Process]]:
    """The servers to start on this host for the checkpoint `source`: address and process of each, not started yet.

    What they serve and their logs go to `directory`. Raises InputError: a port in use, a GPU that isn't there.
    """
    model = write_served(directory / "model", source)
    found = []
    for number, port in enumerate(free_ports(settings)):
        line = command(settings, model, number, port, seed)
        variables = environment(settings, number, os.environ)
        process = Process(f"server {number}", line, variables, directory / f"server-{number}.log")
        found.append((f"http://{settings.host}:{port}", process))
    return found


def free_ports(settings: Settings) -> list[int]:
    """A port for each server: settings.port and following, or free ones. Raises InputError for one in use."""
    with contextlib.ExitStack() as stack:
        ports = []
        for number in range(settings.servers):
            wanted = settings.port and settings.port + number
            try:
                held = stack.enter_context(socket.create_server((settings.host, wanted)))
            except OSError as error:
                raise InputError(
                    f"{WHERE}: a server can't listen on {settings.host} port {wanted} ({error.strerror}); give another "
                    "port, or 0 for free ones"
                ) from None
            ports.append(held.getsockname()[1])
    return ports


class Process:
    """One server, in a session of its own, its output in `log`."""

    def __init__(self, name: str, line: Sequence[str], variables: Mapping[str, str], log: Path):
        self.name, self.log = name, log
        self._line, self._variables = list(line), dict(variables)
        self._guard: subprocess.Popen | None = None
        self._members: set[int] = set()
        self._stopping = threading.Lock()

    def start(self) -> None:
        """Raises InputError where the executable doesn't exist."""
        executable = shutil.which(self._line[0], path=self._variables.get("PATH"))
        if executable is None:
            raise InputError(f"{self._line[0]} is no executable; {WHERE}.python must name a Python")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            output.write(f"\n===== {stamp} {self.name} starts: {' '.join(self._line)}\n".encode())
            output.flush()
            # Popen without preexec_fn: Python code between fork and exec can hang in a process with JAX's threads.
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), executable, *self._line[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._variables,
                start_new_session=True,
            )

    @property
    def group(self) -> int | None:
        """The process group of everything that it started."""
        return guard.pid if (guard := self._guard) else None

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return guard.poll() if (guard := self._guard) else 0

    def note(self) -> None:
        """Remembers which processes it has, for what they leave in memory if somebody else kills them."""
        if guard := self._guard:
            with contextlib.suppress(psutil.Error):
                self._members |= {one.pid for one in psutil.Process(guard.pid).children(recursive=True)}

    def stop(self, grace_s: float = 5.0) -> None:
        """Ends it and everything that it started; returns when nothing of it is left."""
        with self._stopping:  # a recovery and the engine's end may both ask for it
            guard = self._guard
            if guard is None:
                return
            self.note()
            give_up = time.monotonic() + grace_s
            _signal(guard, signal.SIGTERM)
            while _signal(guard, 0) and time.monotonic() < give_up:
                time.sleep(0.05)
            give_up = time.monotonic() + 10
            while _signal(guard, signal.SIGKILL) and time.monotonic() < give_up:
                time.sleep(0.05)
            with contextlib.suppress(subprocess.TimeoutExpired):
                guard.wait(5)
            self._guard = None
            _clean_memory(self._members)
            self._members = set()

    def tail(self, lines: int = 15) -> str:
        """The last lines of the log, each cut to a screen's width."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 20_000))
                found = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(line[:240] for line in found[-lines:])


def _signal(guard: subprocess.Popen, number: int) -> bool:
    """Whether there was anything left in its group to send it to."""
    guard.poll()  # a process that has ended stays in its group until it is waited for
    try:
        os.killpg(guard.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _clean_memory(members: Collection[int]) -> None:
    """Deletes the pixels that a server's processes had not passed on: of large images, gigabytes at every kill."""
    for file in MEMORY.glob("sgl_shm_*_*_*"):  # kind, process, a random name
        if file.name.split("_")[-2] in map(str, members):
            file.unlink(missing_ok=True)
