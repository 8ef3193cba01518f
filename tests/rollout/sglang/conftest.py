"""Real SGLang servers on this CPU, from tiny checkpoints of both families, started once; and stand-ins that fail."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from capcur_jax.models import huggingface
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.logprobs import ban
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.rollout.engine import Sample, Sampling
from capcur_jax.rollout.sglang import checks, fleet
from capcur_jax.rollout.sglang.engine import SGLangEngine
from capcur_jax.rollout.sglang.settings import Settings
from capcur_jax.rollout.sglang.weights import File, Update
from tests.conftest import architecture, random_checkpoint, random_image, windowed_architecture
from tests.packed import padded
from tests.rollout.sglang.scripted import Scripted, ScriptedEngine

ROOT = Path(__file__).parents[3]


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """What needs the real server is marked so, and runs in one worker: two would each start servers."""
    for item in items:
        if "sglang_python" in getattr(item, "fixturenames", ()):
            item.add_marker("sglang")
            item.add_marker(pytest.mark.xdist_group("sglang"))


def served_windowed() -> dict:
    """Windows of 2 x 2 merged features; SGLang knows Qwen2.5-VL with patches of 14 pixels alone."""
    made = windowed_architecture(window=56)
    made["vision"]["patch_size"] = 14
    return made | {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 40}


@dataclasses.dataclass(frozen=True)
class Served:
    """A checkpoint, as the trainer has it and as the servers have it."""

    source: Path
    processor: Processor
    model: QwenVL
    engine: SGLangEngine

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(server.client.address for server in self.engine._fleet.servers)

    @property
    def parameters(self) -> nnx.State:
        return nnx.split(self.model)[1]

    def prompt(self, text: str, *sizes: tuple[float, float]) -> Prompt:
        """Images of these sizes, in merged features."""
        vision = self.processor.config.vision
        side = vision.patch_size * vision.merge_size
        sizes = [(int(width * side), int(height * side)) for width, height in sizes]
        images = [random_image(*size, seed=number) for number, size in enumerate(sizes)]
        return self.processor.prepare(self.processor.render([None] * len(images) + [text]), images)

    def prompts(self) -> list[Prompt]:
        """Text, one image, three images of odd sizes."""
        sizes = [(), ((2.2, 3.4),), ((1.8, 2.7), (2, 2), (4.6, 3.1))]
        return [self.prompt(text, *shown) for text, shown in zip(("3 x 4", "What shape?", "red"), sizes, strict=True)]

    def logprobs(self, parameters: nnx.State, prompt: Prompt, sample: Sample, sampling: Sampling) -> np.ndarray:
        """The trainer's own, of the sample's tokens."""
        t = len(sample.tokens)
        following = np.broadcast_to(prompt.next_position + np.arange(t), (3, t))
        whole = Prompt(
            np.concatenate([prompt.tokens, sample.tokens]).astype(np.int32),
            np.concatenate([prompt.positions, following], 1).astype(np.int32),
            prompt.next_position + t,
            np.concatenate([prompt.visual_index, np.full(t, -1)]).astype(np.int32),
            prompt.patches,
            prompt.grids,
        )
        batch = padded([whole], self.processor, 96 if len(whole) <= 96 else 512, (3, 128))
        logits = _logits(nnx.merge(nnx.split(self.model)[0], parameters), batch, self.processor.banned_tokens)[0]
        scaled = np.asarray(logits, np.float64)[len(prompt) - 1 : len(whole) - 1] / (sampling.temperature or 1.0)
        scaled -= scaled.max(-1, keepdims=True)
        return (scaled - np.log(np.exp(scaled).sum(-1, keepdims=True)))[np.arange(t), sample.tokens]


@nnx.jit(static_argnums=2)
def _logits(model: QwenVL, batch, banned) -> jax.Array:
    return ban(model.logits(model.prefill(batch)[0]), banned)


def changed(parameters: nnx.State, scale: float = 0.02, only: str = "", seed: int = 1) -> nnx.State:
    """Parameters beside them; those whose path begins with `only` alone."""
    random = np.random.default_rng(seed)

    def move(path, leaf):
        noise = scale * random.standard_normal(leaf.shape).astype(np.float32)
        return leaf.replace(leaf[...] + noise) if ".".join(path).startswith(only) else leaf

    return nnx.from_flat_state([(path, move(path, leaf)) for path, leaf in nnx.to_flat_state(parameters)])


@pytest.fixture(scope="session")
def settings(sglang_python):
    return Settings(
        python=sglang_python, device="cpu", dtype="float32", memory_fraction=0.3, concurrency=4, start_timeout_s=300,
        request_timeout_s=120, update_timeout_s=60, environment=("TORCHDYNAMO_DISABLE=1",),
    )  # fmt: skip


@pytest.fixture(scope="session")
def served(settings, tmp_path_factory):
    """{"qwen3_vl": two servers, "qwen2_5_vl": one}"""
    root = tmp_path_factory.mktemp("served")
    kinds = {"qwen3_vl": (architecture, 2), "qwen2_5_vl": (served_windowed, 1)}
    with concurrent.futures.ThreadPoolExecutor() as threads:
        found, starts = {}, {}
        try:
            for name, (make, servers) in kinds.items():
                path = random_checkpoint(root / name, seed=3, make=make)
                processor = Processor.from_directory(path)
                mine = dataclasses.replace(settings, servers=servers)
                starts[name] = (
                    processor,
                    path,
                    threads.submit(SGLangEngine, processor, path, root / f"{name}-run", mine),
                )
            for name, (processor, path, start) in starts.items():
                found[name] = Served(path, processor, huggingface.load(path), start.result())
                found[name].engine.update_weights(found[name].parameters, 0)
            yield found
        finally:
            list(threads.map(lambda start: start[2].result().close(), starts.values()))


@pytest.fixture
def pair(served):
    """The two servers of Qwen3-VL, with the checkpoint's weights."""
    found = served["qwen3_vl"]
    found.engine.update_weights(found.parameters, found.engine.health().version + 1)
    return found


@pytest.fixture
def lent(pair):
    """The same, for another engine to give them its weights."""
    yield pair
    for server in pair.engine._fleet.servers:
        server.checksums = None
    pair.engine._complete_next = True


@pytest.fixture
def files(checkpoint, sets):
    """The settings of a run that name a random model and its problems."""
    return {"config.checkpoint": checkpoint, **{f"config.{key}": value for key, value in sets.items()}}


# ---------------------------------------------------------------------- stand-ins


@pytest.fixture
def servers():
    """Two that fail on demand."""
    made = [Scripted(40), Scripted(50)]
    yield made
    for one in made:
        with contextlib.suppress(OSError):
            one.stop()


@pytest.fixture
def engine(processor, servers, monkeypatch):
    """Makes what asks them, or others; servers that are gone are looked for every 50 ms."""
    monkeypatch.setattr(fleet, "PROBE_S", 0.05)
    monkeypatch.setattr(fleet, "WATCH_S", 0.05)
    for one in servers:
        one.version = "0"
        # The parameters of a server that has all of the table's names.
        one.parameters = {checks.served_name(name): "0" for name in checks.declared(processor.config)}
    made = []

    def make(stand_ins=servers, **settings):
        made.append(ScriptedEngine(processor, stand_ins, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def weights(processor, tmp_path):
    """Complete files of the table's names and shapes: a version after the other, of the same values."""
    shapes = checks.declared(processor.config)

    def make(version: int, names=None, sums=None) -> Update:
        directory, complete = tmp_path / f"{version}-update", tmp_path / f"{version}-complete"
        for path, chosen in ((directory, shapes if names is None else names), (complete, shapes)):
            path.mkdir()
            if chosen:
                save_file({name: np.zeros(shapes[name], np.float32) for name in chosen}, path / "a.safetensors")
        sums = dict.fromkeys(shapes, 0) if sums is None else sums
        return Update(version, directory, complete, (File("a.safetensors", 0, sums),), 0, {})

    return make


@pytest.fixture
def prompt(processor):
    return processor.prepare(processor.render(["What shape?"]))
