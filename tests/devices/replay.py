"""Replays one recorded rollout batch through a step on a mesh and prints what came of it, as JSON.

Run by tests/test_sharding.py in processes of their own, since the number of devices is fixed when JAX starts:

    replay.py CHECKPOINT DATA FSDP TENSOR ROW UPDATES [key=value ...]

The metrics of every update, and a fingerprint of the moments and of the final parameters (their projections on fixed
random directions) do not depend on the mesh, the number of processes or the micro-batches. ROW: tokens of a packed row.
"""

from __future__ import annotations

import ast
import json
import sys

import jax
import numpy as np
from flax import nnx

from capcur_jax import presets, schedule
from capcur_jax.devices import cluster, sharding
from capcur_jax.learner.layout import Layout
from capcur_jax.learner.learner import Learner
from capcur_jax.learner.minibatches import minibatches, sampled_item
from capcur_jax.learner.trainer import Trainer, combined
from capcur_jax.models import huggingface
from capcur_jax.models.batching import Buckets
from capcur_jax.models.inputs import Processor
from capcur_jax.rollout.engine import Sample, Sampling
from capcur_jax.rollout.local.engine import LocalEngine
from tests.conftest import random_image

PROMPTS, GROUP, LENGTH = 16, 3, 12


def recorded(processor: Processor):
    """Prompts with none to two images, responses of all lengths, advantages."""
    random, prompts, groups = np.random.default_rng(0), [], []
    for number in range(PROMPTS):
        images = [random_image(*random.integers(16, 60, 2).tolist(), seed=number) for _ in range(number % 3)]
        text = processor.render([None] * len(images) + ["What shape is it? " * (1 + number % 4)])
        prompts.append(processor.prepare(text, images))
        samples = []
        for _ in range(GROUP):
            tokens = random.integers(8, 300, random.integers(1, LENGTH + 1)).astype(np.int32)
            logprobs = random.normal(-5, 0.3, len(tokens)).astype(np.float32)
            samples.append(Sample.whole(tokens, logprobs, "length" if len(tokens) == LENGTH else "stop", 0))
        groups.append((samples, random.normal(size=GROUP).astype(np.float32)))
    return prompts, groups


def fingerprint(tree: nnx.State) -> dict[str, list[float]]:
    """Projections of each array on fixed directions, computed where the arrays lie."""
    lines = {}
    for path, leaf in nnx.to_flat_state(tree):
        name = ".".join(map(str, path))
        draw = np.random.default_rng(sum(map(ord, name))).normal
        directions = [draw(size=leaf.shape).astype(np.float32) for _ in range(2)]
        project = jax.jit(lambda x, *ds: [(x * d).sum() for d in ds] + [(x * x).sum()])
        lines[name] = [float(value) for value in project(leaf[...], *directions)]
    return lines


def main(arguments: list[str]) -> None:
    checkpoint, *numbers = arguments[:6]
    data, fsdp, tensor, row, updates = map(int, numbers)
    cluster.initialize()
    config = presets.laptop()
    config.mesh.update({"data": data, "fsdp": fsdp, "tensor": tensor})
    config.rollout.update({"group": GROUP, "max_new_tokens": LENGTH})
    config.prompt.max_tokens = 160
    config.packing.update({"shapes": ((row, 2, 256), (row, 8, 256)), "groups": 8})
    config.objective.update({"updates_per_batch": updates, "kl_coefficient": 0.3})
    config.update_from_flattened_dict({k: ast.literal_eval(v) for k, v in (a.split("=") for a in arguments[6:])})
    mesh = sharding.make_mesh(config.mesh)
    model = huggingface.load(checkpoint, mesh=mesh, remat="full")
    processor = Processor.from_directory(checkpoint)
    buckets = Buckets((160, 320), tuple((rows, 64 * 4) for rows in (1, 2, 4, 8, 16)), longest=160)
    graph, parameters = nnx.split(model)
    prompts, groups = recorded(processor)
    engine = LocalEngine(model, processor, slots=PROMPTS, buckets=buckets, prefill=4)
    stage = schedule.stages(config)[0]
    stage = schedule.Stage(**{**stage.__dict__, "prompts": PROMPTS})
    layout = Layout.of(stage, config, buckets, processor, mesh, images=True)
    learner = Learner(
        graph, parameters, objective="grpo", freeze="", config=config, temperature=1.0,
        banned=processor.banned_tokens, mesh=mesh,
    )  # fmt: skip
    share = PROMPTS // updates // jax.process_count()
    mine = [
        n
        for update in range(updates)
        for n in range(PROMPTS)
        if (n * updates // PROMPTS, n // share % jax.process_count()) == (update, jax.process_index())
    ]
    drawn = engine.generate([prompts[n] for n in mine], Sampling(8, temperature=0.0), 2, seed=3)
    items = [sampled_item(prompts[n], *groups[n], config.objective.mask_truncated) for n in mine]
    trained, frozen = learner.split(parameters)
    trainer = Trainer(learner, mesh, learner.start(trained), frozen, reference=learner.copy_as(trained, np.float32))
    trainer.sums = learner.zeros(trained, frozen, next(layout.blanks(passes=False)))
    results = trainer.step(minibatches(items, layout, config), layout.old, [1e-3] * updates)
    report = {
        "updates": [{k: float(v) for k, v in jax.device_get(r).items()} for r in results],
        "combined": combined(jax.device_get(results)),
        "parameters": fingerprint(trainer.state.trained),
        "moments": fingerprint(trainer.state.optimizer.mu),
        "greedy": {str(n): [s.tokens.tolist() for s in group] for n, group in zip(mine, drawn, strict=True)},
        "devices": jax.device_count(),
        "programs": len(learner.accumulate._compiled),
    }
    print("REPORT " + json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
