"""Several processes as one run: how they find each other, which of them owns what, and small values between hosts.

Process 0 is the owner: servers, records and refill decisions are its own, and the others are told what it decided.
`exchange`, `agree`, `broadcast`, `barrier` and `describe` are collective: every process calls the same ones in the same
order, from one thread. They go through JAX's coordination service (the one that `jax.distributed` starts) and not
through the devices: a device collective waits behind the step that is running, is compiled for each shape, and without
x64 cuts 64-bit values.

A run ends well with `barrier("end")`: at exit JAX waits half a minute for the other processes and then ends them all,
so that an error in one of them isn't waited out by the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import cloud_tpu_init
from jax._src import distributed as jax_distributed

from capcur_jax.errors import InputError

COORDINATOR, PROCESS_ID, PROCESS_COUNT = "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_ALONE = "--process_count=1 makes a run of its own of this process"
_REMEDY = {
    "flags": "check --coordinator, --process_id and --process_count",
    "Slurm": f"start the run with srun, one task for each host or for each GPU; {_ALONE}",
    "TPU metadata": "a TPU VM's metadata has to be reachable, or give --coordinator, --process_id and --process_count; "
    f"{_ALONE}",
    "Kubernetes": f"the job's service account has to be allowed to read pods, services and jobs; or give --coordinator "
    f"and --process_count (the process id is then the job's completion index); {_ALONE}",
}
_START_S = 300  # for all processes to be there, as in jax.distributed
_EXIT_S = 30
_WAIT_S = 3 * 3600  # a dead process ends the others within minutes by its heartbeat; this is for one that is slow

_turns = itertools.count()
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags --coordinator=HOST:PORT (an address of process 0), --process_id and --process_count.

    What isn't given is read from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES.
    """

    coordinator: str = ""
    process_id: int | None = None
    process_count: int | None = None


# ---------------------------------------------------------------------- start


def initialize(settings: Settings | None = None) -> None:
    """Joins the run's processes; does nothing where there is one. To be called before anything asks JAX for a device.

    In this order: flags or environment variables (`Settings`), Slurm, TPU metadata, an indexed Kubernetes job.

    Raises:
      InputError: an incomplete or wrong setting, processes that can't reach each other, a cluster that doesn't answer.
    """
    given = _given(settings or Settings(), os.environ)
    if given.process_count == 1:
        return
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read when the backend starts
    # It would catch SIGTERM for itself and keep it; the run's own handler and `agree` do that.
    jax.config.update("jax_enable_preemption_service", False)
    if given.process_count:
        _meet(given)
        _start("flags", given.coordinator, given.process_count, given.process_id, cluster_detection_method="deactivate")
    elif source := detect(os.environ):
        if source == "Kubernetes":
            _need_kubernetes()
        options: dict[str, Any] = {}
        if source == "Slurm":
            options = {"cluster_detection_method": "slurm", "local_device_ids": _slurm_devices(os.environ)}
        _start(source, **options)


def _given(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Flags, completed from the environment: complete, one process, or nothing. Raises InputError."""
    address = settings.coordinator or environ.get(COORDINATOR, "")
    process = _number(settings.process_id, "--process_id", PROCESS_ID, environ)
    count = _number(settings.process_count, "--process_count", PROCESS_COUNT, environ)
    if process is None and address and count and "KUBERNETES_SERVICE_HOST" in environ:
        process = _number(None, "--process_id", "JOB_COMPLETION_INDEX", environ)
    if count == 1 and not process:
        return Settings(process_count=1)
    if process is None and count is None and not settings.coordinator and (not address or detect(environ)):
        return Settings()  # of a cluster that is detected JAX reads the address itself
    missing = [
        f"{flag} (or {variable})"
        for flag, variable, value in (
            ("--coordinator", COORDINATOR, address or None),
            ("--process_id", PROCESS_ID, process),
            ("--process_count", PROCESS_COUNT, count),
        )
        if value is None
    ]
    if missing:
        raise InputError(f"{' and '.join(missing)} is missing: a run of several processes needs all three; {_ALONE}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator={address} (or {COORDINATOR}) isn't HOST:PORT, an address of process 0")
    if count < 1 or not 0 <= process < count:
        raise InputError(
            f"--process_id={process} with --process_count={count} (or {PROCESS_ID}, {PROCESS_COUNT}): "
            "ids go from 0 to one less than the count"
        )
    return Settings(address, process, count)


def _number(value: int | None, flag: str, variable: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(variable, "")
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise InputError(f"{variable}={text!r} isn't a whole number; mend it or give {flag}")
    return int(text)


def detect(environ: Mapping[str, str]) -> str:
    """Which cluster this process is one of several processes of: "Slurm", "TPU metadata", "Kubernetes", or ""."""
    if all(name in environ for name in _SLURM):  # the list of nodes is there in a task that srun started, only
        return "Slurm" if int(environ["SLURM_NTASKS"]) > 1 else ""
    # What JAX itself decides by; its own detection of the cluster depends on it. No public name says it.
    if cloud_tpu_init.running_in_cloud_tpu_vm and "tpu" in (jax.config.jax_platforms or "tpu"):
        hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
        alone = hosts and "," not in hosts and int(environ.get("MEGASCALE_NUM_SLICES") or 1) == 1
        return "" if alone else "TPU metadata"
    indexed = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    return "Kubernetes" if indexed else ""


def _need_kubernetes() -> None:
    try:
        import kubernetes  # noqa: F401 - JAX asks the cluster with it how many pods the job has
    except ImportError:
        raise InputError(
            "this is a pod of an indexed Kubernetes job, and the package that asks how many pods it has is not "
            f"installed: pip install 'jax[k8s]'; {_REMEDY['Kubernetes']}"
        ) from None


def _slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Devices of this task: [] is all that it sees, None leaves it to JAX, which gives each task one.

    With one task a host, JAX's rule would leave all but its first GPU idle; where Slurm has bound GPUs to tasks, a task
    sees its own only and numbers them from 0.
    """
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    tasks = _tasks_on_this_node(environ)
    visible = sum(bool(device) for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    on_node = re.search(r"\d+$", environ.get("SLURM_GPUS_ON_NODE", ""))
    bound = 0 < visible < (int(on_node[0]) if on_node else 0)
    if tasks == 1 or bound:
        return []
    if tasks and visible and visible % tasks == 0:
        share = visible // tasks
        return list(range(int(environ["SLURM_LOCALID"]) * share, (int(environ["SLURM_LOCALID"]) + 1) * share))
    return None


def _tasks_on_this_node(environ: Mapping[str, str]) -> int | None:
    """From Slurm's list, e.g. "2(x3),1": two on each of three nodes, one on the fourth."""
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(nodes or 1)
    node = environ.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _meet(given: Settings) -> None:
    """Finds out what would otherwise end the process without a Python error: JAX's client aborts. Raises InputError."""
    host, _, port = given.coordinator.rpartition(":")
    address = (host.strip("[]"), int(port))
    if given.process_id == 0:
        try:
            socket.create_server(("", address[1])).close()
        except OSError as error:
            raise InputError(
                f"--coordinator={given.coordinator}: process 0 can't open port {port} ({error.strerror}); give another"
            ) from None
        return
    give_up = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > give_up:
                raise InputError(
                    f"--coordinator={given.coordinator}: process 0 didn't answer within {_START_S} s ({error}); is it "
                    "running, is this its address, and is the port open?"
                ) from None
        time.sleep(0.1)


def _start(source: str, *where, **options) -> None:
    try:
        jax.distributed.initialize(*where, initialization_timeout=_START_S, shutdown_timeout_seconds=_EXIT_S, **options)
    except Exception as error:  # KeyError and RuntimeError of the detection, the kubernetes package's, requests'
        raise InputError(
            f"starting as one of several processes ({source}) failed: {error or type(error).__name__}; "
            f"{_REMEDY[source]}"
        ) from error


# ---------------------------------------------------------------------- who is who


def process_id() -> int:
    """This process's number, from 0; starts no backend, as jax.process_index() would."""
    return _state().process_id


def process_count() -> int:
    """Processes of the run; starts no backend, as jax.process_count() would."""
    return _state().num_processes


def is_owner() -> bool:
    """Whether this is process 0, which owns servers, records and refill decisions."""
    return process_id() == 0


def describe() -> dict[str, str]:
    """What the plan printed at start says about processes. Collective, and it starts the backend."""
    hosts = [value.decode() for value in _gather("describe", socket.gethostname().encode())]
    devices = jax.local_devices()
    return {
        "process": f"{process_id()} of {process_count()} on {hosts[process_id()]}",
        "local devices": f"{len(devices)} x {devices[0].device_kind} of {jax.device_count()}",
        "owner of servers, metrics and refill decisions": f"process 0 on {hosts[0]}",
    }


# ---------------------------------------------------------------------- small values between processes


def exchange(values: Any) -> np.ndarray:
    """Everybody's `values`, [processes, ...], bit for bit; a small array of numbers, as long in every process.

    One process gets `values[None]`. Collective; nothing is compiled and no device waits.

    Raises:
      ValueError: shapes or dtypes differ between processes, or the values are no numbers.
    """
    values = np.asarray(values)
    parts = [_unpack(part) for part in _gather("exchange", _pack(values))]
    kinds = {(part.shape, part.dtype) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"exchange: the processes have different shapes or dtypes: {sorted(map(str, kinds))}")
    return np.stack(parts)


def agree(flag: bool) -> bool:
    """True if any process says True. Collective."""
    return any(part == b"1" for part in _gather("agree", b"1" if flag else b"0"))


def broadcast(values: Any) -> np.ndarray:
    """The owner's `values`, bit for bit; what the others pass is ignored (None will do). Collective."""
    return _unpack(_gather("broadcast", _pack(np.asarray(values)) if is_owner() else b"")[0])


def barrier(name: str) -> None:
    """Waits until every process has come here. Collective; raises RuntimeError where one waits at another name."""
    _gather(f"barrier {name}", b"")


def _state():
    """JAX's process-wide state: ids without a backend, and the coordination service's client.

    No public name gives either before the backend starts; orbax reaches for the same one. All use of it is in here.
    """
    return jax_distributed.global_state


def _gather(kind: str, payload: bytes) -> list[bytes]:
    """Payloads of all processes in their order. `kind` has to be the same in all of them.

    Raises:
      RuntimeError: the processes aren't doing the same thing; better than waiting for each other for ever.
    """
    state = _state()
    if state.num_processes == 1:
        return [payload]
    with _lock:
        turn = next(_turns)
        folder = f"capcur_jax/{turn}"
        state.client.key_value_set_bytes(f"{folder}/{state.process_id}", kind.encode() + b"\0" + payload)
        state.client.wait_at_barrier(folder, _WAIT_S * 1000)
        found = {
            int(key.rpartition("/")[2]): value.split(b"\0", 1)
            for key, value in state.client.key_value_dir_get_bytes(folder)
        }
        if state.process_id == 0 and turn:  # everybody is past reading the turn before
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # a little memory, no reason to end a run
                state.client.key_value_delete(f"capcur_jax/{turn - 1}")
    kinds = {process: found[process][0].decode() for process in sorted(found)}
    if set(kinds.values()) != {kind}:
        raise RuntimeError(f"the processes have lost step with each other; they are at {kinds}")
    return [found[process][1] for process in range(state.num_processes)]


def _pack(values: np.ndarray) -> bytes:
    if values.dtype.kind not in "biufc":
        raise ValueError(f"only arrays of numbers can be sent to other processes, not {values.dtype}")
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _unpack(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
