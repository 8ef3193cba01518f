"""The files of launch/ as their own tools see them, and as clusters would; nothing is started."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from capcur_jax import presets
from capcur_jax.devices import cluster
from capcur_jax.rollout.sglang import __main__ as servers
from capcur_jax.rollout.sglang.settings import Settings
from tests.test_main import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
HERE = Path(sys.executable).parent
VALUES = {
    "NAME": "staged", "CONFIG": "configs/staged.py:qwen3_vl_8b", "NODES": "2", "SERVERS": "2", "HOSTS": "2",
    "GPU": "nvidia-h200-141gb", "TPU": "tpu-v5p-slice", "TOPOLOGY": "2x2x2", "IMAGE": "r/capcur:gpu",
    "SERVER_IMAGE": "r/capcur:sglang", "CLAIM": "shared", "BUCKET": "models", "CHECKPOINT": "/bucket/Qwen3-VL-8B",
}  # fmt: skip


def tool(name: str) -> str:
    """From this environment or the system; skips where it is in neither."""
    found = shutil.which(name, path=f"{HERE}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_clean_and_begin_with_their_command(script):
    head = script.read_text().splitlines()[1:12]
    assert any(f"launch/{script.name}" in line for line in head) and os.access(script, os.X_OK)
    done = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.sglang"])
def test_images_are_clean_and_copy_what_is_there(file):
    text = (LAUNCH / file).read_text()
    assert f"docker build -f launch/{file}" in text
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    for extra in re.findall(r"\.\[(\w+)\]", text):
        assert f'"{extra}": [' in (ROOT / "setup.py").read_text()
    done = subprocess.run([tool("hadolint"), LAUNCH / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def job_set(name: str) -> dict:
    """As envsubst makes it of the file, with the variables that the file's own command names."""
    text = (LAUNCH / f"{name}.yaml").read_text()
    (named,) = re.findall(r"envsubst '(.+?)'", text)
    given = set(re.findall(r"\$(\w+)", named))
    exported = set(re.findall(r"\b([A-Z_]+)=", " ".join(re.findall(r"^#   export (.+)$", text, re.MULTILINE))))
    assert given == exported == set(re.findall(r"\$\{(\w+)\}", text))
    return yaml.safe_load(re.sub(r"\$\{(\w+)\}", lambda found: VALUES[found[1]], text))


@pytest.mark.parametrize("name", ["gke_gpu", "gke_tpu"])
def test_job_sets_keep_their_schemas(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    found = job_set(name)
    assert models.JobsetV1alpha2JobSet.from_dict(found).to_dict() == found  # it drops what it doesn't know
    for replicated in found["spec"]["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "x"},
            "spec": replicated["template"]["spec"],
        }
        kubernetes_validate.validate(job, "1.31", strict=True)


def containers(found: dict) -> dict[str, dict]:
    pods = {one["name"]: one["template"]["spec"]["template"]["spec"] for one in found["spec"]["replicatedJobs"]}
    return {name: pod["containers"][0] for name, pod in pods.items()}


@pytest.mark.parametrize("name", ["gke_gpu", "gke_tpu"])
def test_pods_find_each_other_and_their_commands_can_be_run(name, tmp_path):
    found = containers(job_set(name))
    given = {one["name"]: one["value"] for one in found["trainer"]["env"]}
    pod = given | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    assert cluster._given(cluster.Settings(), pod) == cluster.Settings("staged-trainer-0-0.staged:8476", 1, 2)
    # What a pod's shell would start, said instead.
    for program in ("python", "launch/sglang_servers.sh", "hostname"):
        (tmp_path / program).parent.mkdir(exist_ok=True)
        (tmp_path / program).write_text('#!/bin/bash\nprintf \'%s\\n\' "$HOST" "$@"\n')
        (tmp_path / program).chmod(0o755)
    (tmp_path / "hostname").write_text("#!/bin/sh\necho staged-servers-0-1.staged.svc\n")
    lines = {}
    for role, container in found.items():
        done = subprocess.run(
            [*container["command"], *container["args"]], cwd=tmp_path, capture_output=True, text=True, check=True,
            env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOST": ""},
        )  # fmt: skip
        lines[role] = done.stdout.splitlines()
    host, *trainer = lines["trainer"]
    assert trainer[:2] == ["-m", "capcur_jax.main"] and "--workdir=/shared/staged" in trainer
    config = presets.read(VALUES["CONFIG"], [line for line in trainer if line.startswith("--config.")])
    assert config.checkpoint == VALUES["CHECKPOINT"]
    if name == "gke_tpu":
        assert config.rollout.engine == "local"
        return
    settings = Settings.from_config(config.rollout.sglang)
    assert settings.addresses == ("http://staged-servers-0-0.staged:30000", "http://staged-servers-0-1.staged:30000")
    host, *serve = lines["servers"]
    assert host == "staged-servers-0-1.staged.svc"
    options, overrides = servers.parser().parse_known_args(serve)
    served = Settings.from_config(presets.read(options.config, overrides).rollout.sglang)
    assert served.port == 30000 and served.servers * served.tensor_parallel == 8


def test_the_task_of_skypilot_is_whole(tmp_path):
    text = (LAUNCH / "sky.yaml").read_text()
    found = yaml.safe_load(text)
    try:
        from sky import Task
    except ImportError:  # an environment of its own: its pins and ours conflict
        assert set(found) <= {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
        assert set(found["resources"]) <= {"accelerators", "use_spot", "job_recovery"}
    else:
        task = Task.from_yaml(str(LAUNCH / "sky.yaml"))
        assert task.num_nodes == found["num_nodes"] and task.run == found["run"]
    assert set(re.findall(r"--env ([A-Z]+)=", text)) <= set(found["envs"])
    # What a machine runs, with a Python that says what it is told.
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho "$JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $*"\n')
    python.chmod(0o755)
    given = found["envs"] | {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NODE_RANK": "1",
                             "SKYPILOT_NUM_NODES": "2"}  # fmt: skip
    done = subprocess.run(["bash", "-euc", found["run"]], cwd=tmp_path, env={**os.environ, **given},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == (
        "10.0.0.7:8476 1 of 2: -m capcur_jax.main --config=configs/staged.py:qwen3_vl_8b --workdir=/bucket/runs/staged "
        "--config.checkpoint=/bucket/Qwen3-VL-8B\n"
    )


# ---------------------------------------------------------------------- tpu_vm.sh

GCLOUD = r"""#!/bin/bash
printf '%q ' "$@" >>"$SAID"; echo >>"$SAID"
for argument; do case $argument in --command=*) bash -c "${argument#--command=}" ;; esac; done
"""


@pytest.fixture
def tpu(tmp_path):
    """tpu(*arguments): what the script tells gcloud, whose "workers" are this machine's tmp_path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    (tmp_path / "said").touch()

    def run(*arguments: str, code: int = 0) -> str:
        environment = {
            **os.environ, "NAME": "n", "ZONE": "z", "TYPE": "v5p-16", "VERSION": "v2", "SAID": str(tmp_path / "said"),
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        done = subprocess.run(["bash", tmp_path / "launch" / "tpu_vm.sh", *arguments], env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == code, done.stderr
        return (tmp_path / "said").read_text() + done.stderr

    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "tpu_vm.sh", tmp_path / "launch")
    return run


def test_a_slice_is_asked_for_and_given_back(tpu):
    assert (
        "queued-resources create n --node-id=n --zone=z --accelerator-type=v5p-16 --runtime-version=v2 --spot"
        in tpu("create", "--spot")
    )
    assert "queued-resources delete n --zone=z --force" in tpu("delete")
    assert "launch/tpu_vm.sh create" in tpu(code=2) and "run needs --config" in tpu("run", code=2)


def test_a_run_on_a_slice_starts_in_the_background_and_is_stopped(tpu, tmp_path):
    (tmp_path / "capcur/.venv/bin").mkdir(parents=True)
    python = tmp_path / "capcur/.venv/bin/python"
    python.write_text('#!/bin/bash\nprintf "[%s]" "$@"; trap "echo saved; exit" TERM; while :; do sleep 0.1; done\n')
    python.chmod(0o755)
    (tmp_path / "said").touch()
    arguments = ("--config=x", "--workdir=/a b", "--config.order=('text',)")
    os.chdir(tmp_path)
    try:
        said = tpu("run", *arguments)
        assert "--worker=all" in shlex.split(said)
        tpu("stop")
        log = tmp_path / "capcur/run.log"
        from tests.grid.test_executors import until

        assert until(lambda: log.exists() and "saved" in log.read_text())
        assert log.read_text().startswith("[-m][capcur_jax.main][--config=x][--workdir=/a b][--config.order=('text',)]")
    finally:
        os.chdir(ROOT)
