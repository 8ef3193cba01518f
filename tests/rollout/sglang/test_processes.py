"""Two trainer processes, one set of servers: the owner sends weights, each asks for its own prompts."""

import contextlib

import pytest

from capcur_jax.models.inputs import Processor
from capcur_jax.rollout.sglang import checks
from tests.devices.test_distributed import by_variables, free_port
from tests.devices.test_distributed import run as run_processes
from tests.rollout.sglang.scripted import Scripted

CODE = """
from flax import nnx
from capcur_jax.errors import InputError, RolloutError
from capcur_jax.models import huggingface
from capcur_jax.models.inputs import Processor
from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.sglang.engine import SGLangEngine
from capcur_jax.rollout.sglang.settings import Settings
cluster.initialize()
source, workdir, addresses = sys.argv[2:]
processor = Processor.from_directory(source)
# What the owner is told counts: the other process has no address that answers.
given = addresses.split() if distributed.is_owner() else ["http://127.0.0.1:9"]
engine = SGLangEngine(processor, source, workdir, Settings(addresses=tuple(given), weights=workdir, start_timeout_s=3.0,
                      dtype="float32"))
parameters = nnx.state(huggingface.load(source))
engine.update_weights(parameters, 1)
prompts = [processor.prepare(processor.render([word])) for word in ("a", "b", "c")][: 2 + i]
groups = engine.generate(prompts, Sampling(2), 2, 0)
versions = sorted({sample.version for group in groups for sample in group})
print("SAMPLES", [len(group) for group in groups], versions, engine.health().version, engine.health().alive, flush=True)
for version in (2, 3):
    try:
        engine.update_weights(jax.tree.map(lambda x: x * version, parameters), version)
        print("UPDATED", version, engine.health().version, flush=True)
    except RolloutError as error:
        print("FAILED", version, str(error)[:38], flush=True)
engine.release()
engine.resume()
engine.close()
distributed.barrier("end")
"""


@pytest.fixture
def servers(checkpoint):
    config = Processor.from_directory(checkpoint).config
    made = [Scripted(40), Scripted(50)]
    for one in made:
        one.moves = [checks.served_name(name) for name in checks.declared(config)]
    yield made
    for one in made:
        with contextlib.suppress(OSError):
            one.stop()


def test_two_processes_share_servers_versions_and_failures(checkpoint, servers, tmp_path):
    code = f"sys.argv[2:] = {[str(checkpoint), str(tmp_path / 'w'), ' '.join(one.address for one in servers)]!r}\n"
    for one in servers:
        one.refused_version = "3"
    outputs = run_processes(code + CODE, *by_variables(free_port(), 2))
    for number, output in enumerate(outputs):
        lines = [line for line in output.splitlines() if line.startswith(("SAMPLES", "UPDATED", "FAILED"))]
        assert lines == [
            f"SAMPLES {[2] * (2 + number)} [1] 1 2",
            "UPDATED 2 2",
            "FAILED 3 weights of version 3 reached no server",
        ]
    assert sum(len(one.sent("/generate")) for one in servers) == 5
    for one in servers:  # the owner alone
        loads = [body["weight_version"] for body in one.sent("/update_weights_from_disk")]
        assert loads[:3] == ["1", "2", "3"] and loads.count("2") == 1
        assert not one.paused
