"""Decoding compiled for devices that aren't there, at Qwen3-VL-8B's widths: a token reads weights and pages once.

It is as fast as the memory gives those, so that a copy of them is what it must not make. How fast it is shows only on a
card: benchmarks/on_card.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from capcur_jax.plan import topologies

CODE = """if True:
    import dataclasses, json, re, sys, types
    from capcur_jax.plan import topologies
    devices = topologies.devices(sys.argv[1], kernels=False)  # before jax uses a device of its own

    import jax
    import jax.numpy as jnp
    from flax import nnx
    from capcur_jax.devices import sharding
    from capcur_jax.models import config, published
    from capcur_jax.models.batching import Buckets
    from capcur_jax.models.qwen_vl import QwenVL
    from capcur_jax.plan import hlo
    from capcur_jax.rollout.engine import Sampling
    from capcur_jax.rollout.local.engine import LocalEngine

    C, KIB = 64, 2**10
    known = config.from_dict(published.config("qwen3_vl_8b"))
    known = dataclasses.replace(known, text=dataclasses.replace(known.text, depth=2))
    mesh = sharding.make_mesh({"data": 1, "fsdp": len(devices), "tensor": 1}, devices)

    def placed(path, leaf):
        place = sharding.of_parameter(mesh, ".".join(map(str, path)), leaf.shape)
        return path, leaf.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))

    graph, state = nnx.split(nnx.eval_shape(lambda: QwenVL(known, dtype=jnp.bfloat16, mesh=mesh, rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, nnx.from_flat_state([placed(*one) for one in nnx.to_flat_state(state)]))
    tokens = types.SimpleNamespace(config=known, end_tokens=(7, 8), banned_tokens=(9,), pad_token=0)
    engine = LocalEngine(model, tokens, slots=C * len(devices), buckets=Buckets((1024,)), gathered=True)
    work = engine.work(8, Sampling(2048))
    pages = engine.pages_shape(work)
    program = work.decode[False].compile(*engine.decoded(work, pages, C))

    # The program's text: computations by name, and of each its lines.
    computations, fused = {}, set()
    for line in program.as_text().splitlines():
        if found := re.match(r"(ENTRY )?%?([\\w.-]+) .*\\{$", line):
            lines = computations.setdefault("ENTRY" if found[1] else found[2], [])
        elif line.startswith("  "):
            lines.append(line.strip())
            fused |= set(re.findall(r" fusion\\(.*calls=%?([\\w.-]+)", line))
    SIZES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}

    def arrays(text):
        for kind, shape in re.findall(r"\\b([a-z]+\\d+)\\[([\\d,]*)\\]", text):
            count = 1
            for side in filter(None, shape.split(",")):
                count *= int(side)
            if count != C * known.text.vocabulary:  # logits, which are larger than a kernel
                yield count * SIZES.get(kind, 0)

    # Who makes what, of the sizes that count: (operation, name, KiB), in the loop and before or behind it.
    made, collectives = {"loop": [], "around": []}, [0]
    for name in computations.keys() - fused:
        for line in computations[name]:
            found = re.match(r"(?:ROOT )?%?([\\w.-]+) = (.*?) ([a-z][a-z-]*)\\(", line)
            if not found or found[3] in ("parameter", "tuple", "get-tuple-element", "while", "bitcast", "conditional"):
                continue
            size, operation = max(arrays(found[2]), default=0), found[3]
            if re.match("all-|reduce-scatter|collective", operation):
                collectives.append(size // KIB)
            if operation == "fusion":  # which may be of an operation alone, or write into its argument
                inner = "".join(computations[re.search(r"calls=%?([\\w.-]+)", line)[1]])
                operation = "scatter" if " scatter(" in inner else "fusion"
            if operation == "custom-call":
                operation = re.search('custom_call_target="(.*?)"', line)[1]
            if operation.startswith("copy-") and "S(1)" in found[2]:  # to where the product reads it
                operation = "prefetch"
            made["around" if name == "ENTRY" else "loop"].append((operation, found[1], size // KIB))
    size = jax.tree.leaves(pages)[0]
    print(json.dumps({
        "made": made, "collectives": max(collectives), "pages": work.pool.pages, "arrays": len(jax.tree.leaves(pages)),
        "page_kib": size.size * 2 // KIB // len(devices), "text": "paged_attention" in program.as_text(),
        "moved_kib": hlo.traffic(program.as_text(), 2048).moved_a_turn // KIB,
        "read_kib": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(engine.weights[1:])) // KIB,
        "temp_kib": program.memory_analysis().temp_size_in_bytes // KIB,
    }))
"""
# What makes something large in place, or nothing large but its workspace.
MAKERS = {
    "cuda:h200:1x1x1": {"scatter", "__cublas$lt$matmul", "__gpu$xla.gpu.triton"},
    "tpu:v5p:2x2x1": {"scatter", "prefetch"},
}
KERNELS = {"cuda:h200:1x1x1": "__gpu$xla.gpu.triton", "tpu:v5p:2x2x1": "tpu_custom_call"}
SMALLEST = 4096 * 1024 * 2 // 2**10  # KiB: the kernel of keys


@pytest.mark.parametrize("name", MAKERS)
def test_a_token_copies_neither_weights_nor_pages(name):
    if topologies.missing(topologies.parse(name).platform, kernels=False):
        pytest.skip("its compiler is not installed (extra test, on Linux x86-64)")
    done = subprocess.run([sys.executable, "-c", CODE, name], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pages"] == 64 * 24 and found["arrays"] * found["page_kib"] == 4 * 8 * 64 * 24 * 128 * 128 * 2 // 2**10
    loop = found["made"]["loop"]
    # The kernel is there once a layer, and keys and values are written where they lie.
    assert found["text"] and sum(operation == KERNELS[name] for operation, *_ in loop) == 2
    assert [size for operation, _, size in loop if operation == "scatter"] == ([found["page_kib"]] * found["arrays"])
    large = [one for one in loop if one[2] >= SMALLEST and one[0] not in MAKERS[name]]
    assert not large
    # What a token moves is what it must read: the layers and the head, and the keys and values that live (here a prompt
    # and half a response of each row, keys and values of 8 heads in two layers), which the compiled text does not say.
    live = 64 * (1024 + 1024) * 2 * 2 * 8 * 128 * 2 // 2**10
    assert found["moved_kib"] + live <= 1.15 * (found["read_kib"] + live)
    # Around the loop a TPU turns some kernels, once a burst; pages never.
    assert not [one for one in found["made"]["around"] if one[2] >= found["page_kib"]]
    assert found["temp_kib"] < found["page_kib"] and found["collectives"] < SMALLEST
