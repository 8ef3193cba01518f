"""Packed rows and images compiled for devices that aren't there, at Qwen3-VL-8B's size: which kernels come out.

Whether cuDNN finds a plan for its calls, and how fast they are, shows only on a card: benchmarks/on_card.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from capcur_jax.plan import topologies

CODE = """if True:
    import json, re, sys
    from capcur_jax.plan import topologies
    devices = topologies.devices(sys.argv[1], kernels=False)  # before jax uses a device of its own

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from capcur_jax.models import packed_gpu, packed_tpu
    from capcur_jax.models.packed import Packed, Places

    kernels = packed_gpu if sys.argv[1].startswith("cuda") else packed_tpu
    mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
    own = PartitionSpec("rows")
    A, T, N, K, H, B, G, P, I = len(devices), 16384, 32, 8, 128, 12, 5, 16384, 32

    def of(*shape):
        dtype = jnp.bfloat16 if len(shape) == 3 else jnp.int32
        return jax.ShapeDtypeStruct((A, *shape), dtype, sharding=NamedSharding(mesh, own))

    def rows(q, k, v, *places):
        return kernels.packed(q, k, v, Packed(Places(*places), 2048, 2048))

    def prompts(q, k, v, *places):
        return kernels.packed(q, k, v, Packed(Places(*places), 2048, 0))

    def images(q, k, v, starts, lengths):
        return kernels.segments(q, k, v, starts, lengths, P)

    def compiled(function, *arrays):
        specs = {"in_specs": (own,) * len(arrays), "out_specs": own}
        function = jax.shard_map(function, mesh=mesh, check_vma=False, **specs)

        def both(gradient, q, k, v, *tables):
            out, pull = jax.vjp(lambda q, k, v: function(q, k, v, *tables), q, k, v)
            return out, pull(gradient)

        program = jax.jit(both).lower(arrays[0], *arrays).compile()
        calls = [line for line in program.as_text().splitlines() if " custom-call(" in line]
        names = [re.search("|".join(map(re.escape, NAMES)), line) for line in calls]
        temp = program.memory_analysis().temp_size_in_bytes
        return {"calls": sorted(name[0] for name in names if name), "temp": temp}

    NAMES = json.loads(sys.argv[2])
    found = {
        "rows": compiled(rows, of(T, N, H), of(T, K, H), of(T, K, H), of(B), of(B), of(B * G), of(B * G)),
        "prompts": compiled(prompts, of(T, N, H), of(T, K, H), of(T, K, H), of(B), of(B), of(0), of(0)),
        "images": compiled(images, *[of(P, 16, 72)] * 3, of(I), of(I)),
        "many small images": compiled(images, *[of(P, 16, 72)] * 3, of(128 * I), of(128 * I)),
    }
    print(json.dumps(found))
"""
# Two calls of a row's attention, one of prompts' alone and one of images', each with its gradient.
KERNELS = {
    "cuda:h200:1x1x8": ("__cudnn$fmhaSoftmaxBackward", "__cudnn$fmhaSoftmax"),
    "tpu:v5p:2x2x2": ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_both_ways_compile_at_full_size_with_their_own_kernels_alone(name):
    if topologies.missing(topologies.parse(name).platform, kernels=False):
        pytest.skip("its compiler is not installed (extra test, on Linux x86-64)")
    command = [sys.executable, "-c", CODE, name, json.dumps(KERNELS[name])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"]["calls"] == sorted(2 * KERNELS[name])
    for one in ("prompts", "images", "many small images"):
        assert found[one]["calls"] == sorted(KERNELS[name])
    # Nothing of tokens by tokens: a row's scores of one head alone would be 1 GiB.
    assert all(one["temp"] < 2**31 for one in found.values())
