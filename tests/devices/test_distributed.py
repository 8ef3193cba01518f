"""Several processes: how they are found, that they hear each other to the last bit, and that nothing waits for ever."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from capcur_jax.devices import cluster, distributed
from capcur_jax.devices.cluster import Settings
from capcur_jax.errors import InputError
from capcur_jax.records.metrics import CompilationCounter
from tests.environment import TOGETHER

CLUSTERS = (
    "SLURM_",
    "JAX_COORDINATOR",
    "JAX_PROCESS",
    "JAX_NUM_PROCESSES",
    "JAX_LOCAL",
    "KUBERNETES_",
    "JOB_COMPLETION",
    "TPU_",
    "OMPI_",
    "MEGASCALE_",
)
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(CLUSTERS):
            monkeypatch.delenv(name)


@contextlib.contextmanager
def processes(code: str, *environments: dict[str, str]):
    """One process an environment, running `code`, which has `i` and the module at hand; ended at the latest on exit."""
    preamble = "import sys, jax, numpy as np\nfrom capcur_jax.devices import cluster, distributed\n"
    preamble += "i = int(sys.argv[1])\n"
    bare = {key: value for key, value in os.environ.items() if not key.startswith(CLUSTERS)}
    bare |= {"JAX_NUM_CPU_DEVICES": "2", **TOGETHER}
    started = [
        subprocess.Popen(
            [sys.executable, "-u", "-c", preamble + textwrap.dedent(code), str(i)],
            env=bare | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i, environment in enumerate(environments)
    ]  # fmt: skip
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def run(code: str, *environments: dict[str, str]) -> list[str]:
    """Output of each process, all of which have to end well."""
    with processes(code, *environments) as started:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n---\n".join(outputs)
    return outputs


def free_port(least: int = 20000, most: int = 65500) -> int:
    while True:
        port = random.SystemRandom().randrange(least, most)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def by_variables(port: int, count: int = 2) -> list[dict[str, str]]:
    shared = {cluster.COORDINATOR: f"localhost:{port}", cluster.PROCESS_COUNT: str(count)}
    return [shared | {cluster.PROCESS_ID: str(i)} for i in range(count)]


# ---------------------------------------------------------------------- two real processes


def test_two_processes_hear_each_other_to_the_last_bit(tmp_path):
    code = """
        import os, pathlib
        from capcur_jax.errors import InputError
        from capcur_jax.records.metrics import CompilationCounter
        cluster.initialize()
        assert distributed.process_count() == 2 and distributed.process_id() == i
        assert distributed.is_owner() == (i == 0)
        assert jax._src.xla_bridge._backends == {}, "who is who starts no backend"
        with CompilationCounter() as counter:
            whole = distributed.exchange(np.array([2**53 + 1 + i, -(2**62) - i], np.int64))
            assert whole.dtype == np.int64 and whole.tolist() == [[2**53 + 1 + p, -(2**62) - p] for p in (0, 1)]
            real = np.array([[np.pi, 1 / 3, 1e300, np.nan], [np.inf, -0.0, 5e-324, i]])
            both = distributed.exchange(real)
            assert both.dtype == np.float64 and both.shape == (2, 2, 4) and both[:, 1, 3].tolist() == [0, 1]
            assert both[i].tobytes() == real.tobytes()
            for step in range(20):
                assert distributed.exchange(np.float64(step + i)).tolist() == [step, step + 1]
            assert distributed.agree(False) is False and distributed.agree(i == 1) is True
            assert distributed.agree(i == 0) is True and distributed.agree(True) is True
            sent = distributed.broadcast(np.array([2**40 + 1, 3]) if i == 0 else None)
            assert sent.tolist() == [2**40 + 1, 3]
            distributed.barrier("here")
            came = pathlib.Path(os.environ["FOLDER"]) / "came"

            def come():
                if i == 1:
                    raise InputError("not here")
                return came.write_text("0")

            # Of one host's processes one acts first; that the other fails is known to both.
            assert distributed.by_host(lambda: came.exists() or came.mkdir(), "it") == (True if i else None)
            came.rmdir() if i == 0 else None
            try:
                distributed.by_host(come, "it")
            except InputError as error:
                print("HOST", error, came.read_text())
            assert counter.count == 0
        left = jax._src.distributed.global_state.client.key_value_dir_get_bytes("capcur_jax/")
        assert len(left) <= 4, f"values of earlier turns are deleted: {left}"

        # The devices of both are one mesh.
        assert (jax.device_count(), jax.local_device_count()) == (4, 2)
        spec = jax.sharding.NamedSharding(jax.make_mesh((4,), ("data",)), jax.P("data"))
        shares = jax.make_array_from_callback((4,), spec, lambda at: np.arange(1.0, 5.0, dtype=np.float32)[at])
        assert float(jax.jit(lambda x: x.sum())(shares)) == 10
        print(distributed.describe())

        # Shapes that differ and processes that are at different places are errors, not an endless wait.
        try:
            distributed.exchange(np.zeros(2 + i))
        except ValueError as error:
            print("VALUE", error)
        try:
            distributed.agree(True) if i else distributed.barrier("save")
        except RuntimeError as error:
            print("STEP", error)
    """
    host = socket.gethostname()
    environments = [variables | {"FOLDER": str(tmp_path)} for variables in by_variables(free_port())]
    for i, output in enumerate(run(code, *environments)):
        assert f"HOST {'not here' if i else 'another process refuses it, and says why'} 0" in output
        assert f"'process': '{i} of 2 on {host}'" in output and "'local devices': '2 x cpu of 4'" in output
        assert f"'owner of records and servers': 'process 0 on {host}'" in output
        assert "VALUE exchange: the processes have different shapes" in output and "((3,), dtype('float64'))" in output
        assert "{0: 'barrier save', 1: 'agree'}" in output


def test_flags_start_two_processes_and_sigterm_still_reaches_python():
    port = free_port()
    code = f"""
        import os, signal
        seen = []
        signal.signal(signal.SIGTERM, lambda *unused: seen.append("SIGTERM"))
        cluster.initialize(cluster.Settings("localhost:{port}", i, 2))
        os.kill(os.getpid(), signal.SIGTERM)
        print(seen, distributed.exchange(np.array(i)).tolist())
    """
    assert [output.splitlines()[-1] for output in run(code, {}, {})] == ["['SIGTERM'] [0, 1]"] * 2


def test_slurm_starts_two_processes():
    port = free_port(65535 - 2**12 + 1)  # JAX takes the port from the job's number
    job = SLURM | {"SLURM_JOB_ID": str(port - (65535 - 2**12 + 1)), "SLURM_STEP_TASKS_PER_NODE": "2"}
    code = "cluster.initialize()\nprint(distributed.process_id(), distributed.exchange(np.array(i * 10)).tolist())"
    tasks = [job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NODEID": "0"} for i in range(2)]
    assert [output.splitlines()[-1] for output in run(code, *tasks)] == ["0 [0, 10]", "1 [0, 10]"]


def test_kubernetes_with_coordinator_and_count_takes_the_completion_index():
    shared = {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        cluster.COORDINATOR: f"localhost:{free_port()}",
        cluster.PROCESS_COUNT: "2",
    }
    code = "cluster.initialize()\nprint(distributed.process_id(), distributed.exchange(np.array(i)).tolist())"
    pods = [shared | {"JOB_COMPLETION_INDEX": str(i)} for i in range(2)]
    assert [output.splitlines()[-1] for output in run(code, *pods)] == ["0 [0, 1]", "1 [0, 1]"]


# Stands in for the client package: a job of two pods, which the service account may read or not.
KUBERNETES_CLIENT = """
    import os
    from types import SimpleNamespace as Named
    class ApiException(Exception):
        status, reason = 403, "Forbidden"
    class Api:
        def list_namespaced_pod(self, **unused):
            if "FORBIDDEN" in os.environ:
                raise ApiException
            return Named(items=[Named(metadata=Named(labels={"job-name": "train"}))])
        def read_namespaced_job(self, name, namespace):
            return Named(spec=Named(parallelism=2)) if (name, namespace) == ("train", "default") else None
    config = Named(load_incluster_config=lambda: None)
    exceptions = Named(ApiException=ApiException)
    client = Named(CoreV1Api=Api, BatchV1Api=Api, exceptions=exceptions)
"""
KUBERNETES_RUN = """
    from jax._src.clusters import k8s_cluster
    k8s_cluster.K8sCluster._namespace = lambda: "default"  # a file that every pod has
    k8s_cluster.time.sleep = lambda seconds: None
    cluster.initialize()
    print(distributed.process_id(), distributed.exchange(np.array(i)).tolist())
"""


def pods(directory, **variables) -> list[dict[str, str]]:
    (directory / "kubernetes.py").write_text(textwrap.dedent(KUBERNETES_CLIENT))
    path = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    shared = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "localhost", "PYTHONPATH": path} | variables
    return [shared | {"JOB_COMPLETION_INDEX": str(i)} for i in range(2)]


def test_kubernetes_asks_the_cluster_how_many_pods_the_job_has(tmp_path):
    outputs = run(KUBERNETES_RUN, *pods(tmp_path, **{cluster.COORDINATOR: f"localhost:{free_port()}"}))
    assert [output.splitlines()[-1] for output in outputs] == ["0 [0, 1]", "1 [0, 1]"]


def test_kubernetes_that_refuses_says_what_it_needs(tmp_path):
    with processes(KUBERNETES_RUN, pods(tmp_path, FORBIDDEN="1")[0]) as (pod,):
        output = pod.communicate(timeout=60)[0]
    assert pod.returncode == 1
    assert "InputError: starting as one of several processes (Kubernetes) failed: Kubernetes API Error: 403" in output
    assert "--process_count=1 makes a run of its own" in output


def test_a_process_that_dies_ends_the_others():
    """Nobody trains on alone; the limit is the harness's, not the library's."""
    code = """
        cluster.initialize()
        distributed.barrier("both are here")
        if i == 0:
            import os
            os._exit(1)
        distributed.barrier("never")
        print("went on alone")
    """
    with processes(code, *by_variables(free_port())) as (owner, other):
        assert owner.wait(timeout=60) == 1
        output = other.communicate(timeout=120)[0]
        assert other.returncode != 0 and "went on alone" not in output


def test_an_error_in_one_process_ends_the_others():
    code = """
        cluster._EXIT_S = 1
        cluster.initialize()
        distributed.barrier("both are here")
        if i == 1:
            raise FloatingPointError("a bug")
        distributed.barrier("never")
        print("went on alone")
    """
    with processes(code, *by_variables(free_port())) as (owner, other):
        assert "FloatingPointError: a bug" in other.communicate(timeout=120)[0]
        assert "went on alone" not in owner.communicate(timeout=120)[0]
        assert owner.returncode != 0 and other.returncode != 0


# ---------------------------------------------------------------------- one process


def test_one_process_starts_nothing(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("nothing is to be started")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    cluster.initialize()
    cluster.initialize(Settings(process_count=1))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a pod, but no indexed job
    cluster.initialize()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    cluster.initialize(Settings(process_count=1))
    for name, value in (SLURM | {"SLURM_NTASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    cluster.initialize()


def test_one_process_answers_itself_without_device_work():
    values = np.array([2**40 + 1, -3])
    with CompilationCounter() as counter:
        assert distributed.exchange(values).tolist() == [[2**40 + 1, -3]]
        assert distributed.exchange(2.5).tolist() == [2.5]
        assert distributed.agree(True) is True and distributed.agree(False) is False
        assert distributed.broadcast(values).tolist() == values.tolist()
        distributed.barrier("alone")
        assert distributed.is_owner() and counter.count == 0
    assert distributed.describe()["process"] == f"0 of 1 on {socket.gethostname()}"
    with pytest.raises(ValueError, match="only arrays of numbers"):
        distributed.exchange(np.array(["text"]))


# ---------------------------------------------------------------------- what the user gets wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(coordinator="host:1"), r"--process_id \(or JAX_PROCESS_ID\) and --process_count"),
        (Settings(process_id=1), r"--coordinator \(or JAX_COORDINATOR_ADDRESS\) and --process_count .* is missing"),
        (Settings(process_count=2), r"^--coordinator \(or [A-Z_]+\) and --process_id \(or [A-Z_]+\) is missing"),
        (Settings("host:1", process_count=2), r"^--process_id \(or JAX_PROCESS_ID\) is missing"),
        (Settings("host", 0, 2), "isn't HOST:PORT"),
        (Settings("host:99999", 0, 2), "isn't HOST:PORT"),
        (Settings(":80", 0, 2), "isn't HOST:PORT"),
        (Settings("host:1", 2, 2), "--process_id=2 with --process_count=2"),
        (Settings("host:1", 1, 1), "--process_id=1 with --process_count=1"),
        (Settings("host:1", -1, 2), "--process_id=-1"),
        (Settings("host:1", 0, 0), "--process_count=0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        cluster.initialize(settings)


def test_wrong_variables_are_named(monkeypatch):
    monkeypatch.setenv(cluster.COORDINATOR, "localhost:1")
    with pytest.raises(InputError, match=r"--process_id .* and --process_count .* is missing"):
        cluster.initialize()
    monkeypatch.setenv(cluster.PROCESS_COUNT, "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES='two' isn't a whole number"):
        cluster.initialize()


def test_flags_come_before_variables_and_these_before_slurm(monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **options: started.append((where, options)))
    monkeypatch.setattr(cluster, "_meet", lambda given: None)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    cluster.initialize()
    assert started[-1][0] == () and started[-1][1]["cluster_detection_method"] == "slurm"
    monkeypatch.setenv(cluster.COORDINATOR, "other:5")
    cluster.initialize()
    assert started[-1][0] == (), "with an address alone, JAX reads it and Slurm says the rest"
    monkeypatch.setenv(cluster.PROCESS_COUNT, "3")
    monkeypatch.setenv(cluster.PROCESS_ID, "2")
    cluster.initialize()
    assert started[-1][0] == ("other:5", 3, 2) and started[-1][1]["cluster_detection_method"] == "deactivate"
    cluster.initialize(Settings("mine:6", 1, 4))
    assert started[-1][0] == ("mine:6", 4, 1)


def test_coordinator_that_cannot_open_its_port_or_does_not_answer(monkeypatch):
    monkeypatch.setattr(cluster, "_START_S", 0)
    with socket.create_server(("", 0)) as taken, pytest.raises(InputError, match="process 0 can't open port"):
        cluster.initialize(Settings(f"localhost:{taken.getsockname()[1]}", 0, 2))
    with pytest.raises(InputError, match="process 0 didn't answer within 0 s"):
        cluster.initialize(Settings(f"localhost:{free_port()}", 1, 2))


def test_kubernetes_without_its_package(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(InputError, match=r"pip install 'jax\[k8s\]'; .*--process_count=1 makes a run of its own"):
        cluster.initialize()


# ---------------------------------------------------------------------- detection


def test_detection():
    assert cluster.detect({}) == ""
    assert cluster.detect(SLURM) == "Slurm"
    assert cluster.detect(SLURM | {"SLURM_NTASKS": "1"}) == ""
    batch_script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert cluster.detect(batch_script) == "", "not started by srun"
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert cluster.detect(pod) == ""
    assert cluster.detect(pod | {"JOB_COMPLETION_INDEX": "0"}) == "Kubernetes"
    assert cluster.detect(SLURM | pod | {"JOB_COMPLETION_INDEX": "0"}) == "Slurm"


def test_detection_on_a_tpu_host(monkeypatch):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}
    assert cluster.detect(hosts) == "", "no TPU here"
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cluster, "jax", _with_platforms(None))
    assert cluster.detect(hosts) == cluster.detect(hosts | pod) == "TPU metadata"
    assert cluster.detect({"TPU_WORKER_HOSTNAMES": "a"}) == ""
    assert cluster.detect({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == "TPU metadata"
    assert cluster.detect({}) == "TPU metadata", "a TPU VM's metadata server is asked"
    monkeypatch.setattr(cluster, "jax", _with_platforms("cpu"))
    assert cluster.detect(hosts) == "", "the run doesn't use the TPU"


def _with_platforms(platforms):
    import types

    return types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms=platforms))


def test_devices_of_a_slurm_task():
    def devices(task=0, **variables):
        return cluster._slurm_devices(SLURM | {"SLURM_LOCALID": str(task), "SLURM_NODEID": "0"} | variables)

    eight = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}
    assert devices(SLURM_STEP_TASKS_PER_NODE="1(x2)", **eight) == [], "one task a host has all its GPUs"
    assert devices(3, SLURM_STEP_TASKS_PER_NODE="8(x2)", **eight) == [3]
    assert devices(1, SLURM_STEP_TASKS_PER_NODE="2", **eight) == [4, 5, 6, 7]
    assert devices(2, SLURM_STEP_TASKS_PER_NODE="8", CUDA_VISIBLE_DEVICES="2", SLURM_GPUS_ON_NODE="8") == [], "bound"
    assert devices(2, SLURM_STEP_TASKS_PER_NODE="3", **eight) is None, "JAX's rule: one each"
    assert devices() is None
    assert devices(SLURM_STEP_TASKS_PER_NODE="1", JAX_LOCAL_DEVICE_IDS="0,1", **eight) is None, "the user's word"


def test_tasks_on_a_slurm_node():
    def tasks(node):
        return cluster._tasks_on_this_node({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": node})

    assert [tasks(node) for node in "01234"] == [2, 2, 2, 1, None]
