"""How the processes of a run find each other: flags, Slurm, TPU metadata or an indexed Kubernetes job."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import cloud_tpu_init

from capcur_jax.devices import drivers
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags --coordinator=HOST:PORT (an address of process 0), --process_id and --process_count.

    What isn't given is read from JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES.
    """

    coordinator: str = ""
    process_id: int | None = None
    process_count: int | None = None


def initialize(settings: Settings | None = None) -> None:
    """Joins the run's processes; does nothing where there is one. To be called before anything asks JAX for a device.

    In this order: flags or environment variables (`Settings`), Slurm, TPU metadata, an indexed Kubernetes job.

    Raises:
      InputError: an incomplete or wrong setting, processes that can't reach each other, a cluster that doesn't answer.
    """
    given = _given(settings or Settings(), os.environ)
    source = "" if given.process_count else detect(os.environ)
    if (given.process_count or 1) > 1 or source or jax.config.jax_num_cpu_devices > 1:
        drivers.threads_for_collectives()
    if given.process_count == 1:
        return
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read when the backend starts
    # It would catch SIGTERM for itself and keep it; the run's own handler and `agree` do that.
    jax.config.update("jax_enable_preemption_service", False)
    if given.process_count:
        _meet(given)
        _start("flags", given.coordinator, given.process_count, given.process_id, cluster_detection_method="deactivate")
    elif source:
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
    """The cluster that started this process as one of several: "Slurm", "TPU metadata", "Kubernetes", or ""."""
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
    """Devices of this task: [] for every device that it sees; None lets JAX give each task one.

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
