"""Collectives and FLOPs against numbers worked out by hand: from compilers' texts, and from programs compiled here."""

# ruff: noqa: E501 (compilers write long lines)

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from capcur_jax.devices import sharding
from capcur_jax.models.attention import Packed, Places, attend
from capcur_jax.plan import topologies
from capcur_jax.plan.flops import jaxpr_flops
from capcur_jax.plan.hlo import Collective, traffic

# ---------------------------------------------------------------------- collectives

# One layer's loop as XLA writes it for a GPU (asynchronous pairs, the loop's length beside it) and for a TPU (a
# reduce-scatter fused of all-reduce and slice; the counter goes from 1 to 11 by 2, five turns), shortened.
GPU = """HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}

%body (p: (s32[], bf16[256,2048])) -> (s32[], bf16[256,2048]) {
  %p = (s32[], bf16[256,2048]{1,0}) parameter(0)
  %a = bf16[256,2048]{1,0} get-tuple-element(%p), index=1
  %ag = ((bf16[256,2048]{1,0}, bf16[256,2048]{1,0}), (bf16[1024,2048]{1,0}, /*index=1*/bf16[1024,2048]{1,0})) all-gather-start(%a, %a), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %got = (bf16[1024,2048]{1,0}, bf16[1024,2048]{1,0}) all-gather-done(%ag)
  %b = bf16[1024,2048]{1,0} get-tuple-element(%got), index=0
  %ar = bf16[1024,2048]{1,0} all-reduce-start(%b), replica_groups=[4,2]<=[8], to_apply=%add
  %reduced = bf16[1024,2048]{1,0} all-reduce-done(%ar)
  %rs = ((bf16[1024,2048]{1,0}), (bf16[256,2048]{1,0})) reduce-scatter-start(%reduced), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, to_apply=%add
  %kept = bf16[256,2048]{1,0} reduce-scatter-done(%rs)
  %cp = (bf16[256,2048]{1,0}, bf16[256,2048]{1,0}, u32[], u32[]) collective-permute-start(%kept), source_target_pairs={{0,1},{1,0}}
  %passed = bf16[256,2048]{1,0} collective-permute-done(%cp)
  ROOT %out = (s32[], bf16[256,2048]{1,0}) tuple(%i, %passed)
}

%condition (p: (s32[], bf16[256,2048])) -> pred[] {
  ROOT %go = pred[] constant(true)
}

ENTRY %main (x: bf16[256,2048]) -> bf16[256,2048] {
  %x = bf16[256,2048]{1,0} parameter(0)
  %init = (s32[], bf16[256,2048]{1,0}) tuple(%zero, %x)
  %loop = (s32[], bf16[256,2048]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %r = bf16[256,2048]{1,0} get-tuple-element(%loop), index=1
}
"""
TPU = """HloModule jit_step

%all-reduce-scatter.2.clone.1 (i: bf16[1024,2048], j: bf16[64,2048]) -> (bf16[256,2048], bf16[16,2048]) {
  %i = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %j = bf16[64,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %ar = (bf16[1024,2048]{1,0:T(8,128)(2,1)}, bf16[64,2048]{1,0:T(8,128)(2,1)S(1)}) all-reduce(%i, %j), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %kept = (bf16[256,2048]{1,0:T(8,128)(2,1)}, bf16[16,2048]{1,0}) fusion(%ar), kind=kCustom, calls=%slices
}

%body (p: (s32[], bf16[256,2048])) -> (s32[], bf16[256,2048]) {
  %a = bf16[256,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %ag = bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)} all-gather(%a), replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}
  %fused = (bf16[256,2048]{1,0}, bf16[16,2048]{1,0}) fusion(%ag, %k), kind=kCustom, calls=%all-reduce-scatter.2.clone.1
  %kernel = bf16[8]{0} custom-call(%ag), custom_call_target="tpu_custom_call", metadata={
}} spread over lines
  %two = s32[]{:T(128)} constant(2)
  %c = s32[]{:T(128)} get-tuple-element(%p), index=0
  %next = s32[]{:T(128)} add(%c, %two)
  ROOT %out = (s32[], bf16[256,2048]{1,0}) tuple(%next, %s)
}

%compare (c: s32[], n: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(11)
  ROOT %less = pred[] compare(%c, %limit), direction=LT
}

%condition (p: (s32[], bf16[256,2048])) -> pred[] {
  %c = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %go = pred[]{:T(512)} fusion(%c, %n), kind=kLoop, calls=%compare
}

ENTRY %main (x: bf16[256,2048]) -> bf16[256,2048] {
  %one = s32[]{:T(128)} constant(1)
  %from = s32[]{:T(128)} copy(%one)
  %init = (s32[]{:T(128)}, bf16[256,2048]{1,0}) tuple(%from, %x)
  ROOT %loop = (s32[], bf16[256,2048]{1,0:T(8,128)(2,1)}) while(%init), condition=%condition, body=%body, metadata={op_name="while"}
}
"""
MIB = 2**20


def test_a_gpus_text():
    found = traffic(GPU)
    assert found.unknown_loops == 0
    assert found.collectives == (
        Collective("all-gather", 4, 6, 6 * 8 * MIB),
        Collective("all-reduce", 2, 6, 6 * 4 * MIB),
        Collective("collective-permute", 0, 6, 6 * 1 * MIB),
        Collective("reduce-scatter", 4, 6, 6 * 4 * MIB),
    )
    # In a ring: three quarters of what is gathered or scattered, both halves of what is reduced, all that is passed on.
    assert found.sent == 6 * (8 * 3 / 4 + 4 + 1 + 4 * 3 / 4) * MIB


def test_a_tpus_text():
    found = traffic(TPU)
    assert found.unknown_loops == 0
    assert found.collectives == (
        Collective("all-gather", 4, 5, 5 * 4 * MIB),
        Collective("reduce-scatter", 4, 5, 5 * (1024 + 64) * 2048 * 2),
    )


def test_a_loop_of_unknown_length_is_counted_once_and_said():
    found = traffic(GPU.replace('"known_trip_count":{"n":"6"}', ""))
    assert found.unknown_loops == 1
    assert found.collectives[0] == Collective("all-gather", 4, 1, 8 * MIB)


def test_a_loop_that_ends_by_what_it_computes_has_the_callers_turns():
    """Decoding's: its condition has a comparison with a number that is not its end."""
    ends = GPU.replace('"known_trip_count":{"n":"6"}', "").replace(
        "  ROOT %go = pred[] constant(true)",
        """  %p = (s32[], bf16[256,2048]) parameter(0)
  %c = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(0)
  %less = pred[] compare(%c, %limit), direction=LT
  ROOT %go = pred[] and(%less, %less)""",
    )
    once, found = traffic(ends), traffic(ends, 100)
    assert (once.unknown_loops, found.unknown_loops, found.collectives_a_turn) == (1, 0, 4)
    assert found.sent == 100 * once.sent > 0 and (found.moved, once.moved_a_turn) == (0, 0)
    assert found.moved_a_turn == once.moved  # all of this program is in the loop


# ---------------------------------------------------------------------- memory

MEMORY = """HloModule jit_step

%sliced (a: bf16[36,64,64], i: s32[]) -> bf16[64,64] {
  %a = bf16[36,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = bf16[1,64,64]{2,1,0} dynamic-slice(%a, %i), dynamic_slice_sizes={1,64,64}
  ROOT %out = bf16[64,64]{1,0} bitcast(%one)
}

%product (a: bf16[36,64,64], i: s32[], x: bf16[8,64]) -> bf16[8,64] {
  %a = bf16[36,64,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %w = bf16[64,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%sliced
  ROOT %y = bf16[8,64]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%placed (c: bf16[512,64], x: bf16[8,64], i: s32[]) -> bf16[512,64] {
  %c = bf16[512,64]{1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %put = bf16[512,64]{1,0} dynamic-update-slice(%c, %x, %i, %i)
}

ENTRY %main (a: bf16[36,64,64], x: bf16[8,64], c: bf16[512,64], i: s32[]) -> bf16[512,64] {
  %a = bf16[36,64,64]{2,1,0} parameter(0)
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %c = bf16[512,64]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %y = bf16[8,64]{1,0} fusion(%a, %i, %x), kind=kOutput, calls=%product
  %z = bf16[8,64]{1,0} copy(%y)
  ROOT %put = bf16[512,64]{1,0} fusion(%c, %z, %i), kind=kLoop, calls=%placed
}
"""


def test_bytes_of_slices_updates_in_place_and_what_lies_on_the_chip():
    weights, row, index = 64 * 64 * 2, 8 * 64 * 2, 4
    product = weights + index + row  # one layer's weights, not 36; x lies on the chip
    assert traffic(MEMORY).moved == product + 2 * row + (row + index + row)


PROGRAM = """
import json, sys
from capcur_jax.plan import hlo, topologies
devices = topologies.devices(sys.argv[1], kernels=False)
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(devices[:8]).reshape(4, 2), ("a", "b"))

def body(x):  # [8, 128, 256] float32, 1 MiB a device
    def step(x, _):
        y = jax.lax.all_gather(x, "a", axis=0, tiled=True)
        z = jax.lax.psum_scatter(jnp.sin(y), "a", scatter_dimension=0, tiled=True)
        z = jax.lax.psum(jnp.cos(z), "b")
        z = jax.lax.all_to_all(jnp.sin(z), "b", 0, 1, tiled=True).reshape(x.shape)
        return jax.lax.ppermute(jnp.cos(z), "a", [(i, (i + 1) % 4) for i in range(4)]), None
    return jax.lax.scan(step, x, None, length=7)[0]

function = jax.shard_map(body, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
sharding = NamedSharding(mesh, P(("a", "b")))
array = jax.ShapeDtypeStruct((64, 128, 256), jnp.float32, sharding=sharding)
found = hlo.traffic(jax.jit(function).lower(array).compile().as_text())
print(json.dumps([found.collectives, found.unknown_loops]))
"""


@pytest.mark.parametrize("topology", ["cpu:8", "cuda:h200:1x1x8", "tpu:v5p:2x2x2"])
def test_a_program_compiled_here(topology):
    if topologies.missing(topologies.parse(topology).platform, kernels=False):
        pytest.skip("its compiler is not installed (extra test, on Linux x86-64)")
    command = [sys.executable, "-c", PROGRAM, topology]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [
        [
            ["all-gather", 4, 7, 7 * 4 * MIB],
            ["all-reduce", 2, 7, 7 * MIB],
            ["all-to-all", 2, 7, 7 * MIB],
            ["collective-permute", 0, 7, 7 * MIB],
            ["reduce-scatter", 4, 7, 7 * 4 * MIB],
        ],
        0,
    ]


# ---------------------------------------------------------------------- FLOPs


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def flops(function, *arguments, **how) -> int:
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments), **how)


def test_products_with_batch_axes_and_several_contracted():
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), array(3, 4, 5), array(3, 5, 7)) == 2 * 3 * 4 * 5 * 7
    assert flops(lambda a, b: jnp.tensordot(a, b, 2), array(4, 5, 6), array(5, 6, 7)) == 2 * 4 * 5 * 6 * 7


def test_a_convolution():
    def convolve(images, kernel):
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops(convolve, array(2, 8, 8, 3), array(3, 3, 3, 5)) == 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)


@pytest.mark.parametrize(("remat", "products"), [(False, 3), (True, 4)])
def test_scanned_layers_and_their_gradients(remat, products):
    """Forwards once, backwards twice; recomputed once more. The loss itself has no products."""

    def loss(w_LxDxD, x_BxD):
        def layer(x, w):
            return jnp.sin(x @ w), None

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x_BxD, w_LxDxD)[0].sum()

    one = 2 * 16 * 8 * 8
    assert flops(loss, array(5, 8, 8), array(16, 8)) == 5 * one
    assert flops(jax.grad(loss, argnums=(0, 1)), array(5, 8, 8), array(16, 8)) == products * 5 * one


def test_shapes_inside_shard_map_are_those_of_a_device():
    mesh = AbstractMesh((4, 2), ("a", "b"))

    def product(x, w):
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("a"), P(None, "b")), out_specs=P("a", "b"))(x, w)

    assert flops(product, array(64, 32), array(32, 16)) == 2 * 64 * 32 * 16


def test_a_loop_of_unknown_length_runs_as_often_as_the_caller_says():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w, x)

    assert flops(loop, array(4, 4), array(4, 4), trips=11) == 11 * 2 * 4**3


def test_the_dearer_branch_counts():
    def either(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x @ (x @ x), x)

    assert flops(either, jax.ShapeDtypeStruct((), bool), array(4, 4)) == 2 * 2 * 4**3


def test_attention_counts_every_product_whatever_kernel_computes_it():
    B, T, N, K, H = 2, 256, 4, 2, 64
    q, k = (jax.ShapeDtypeStruct((B, T, heads, H), jnp.bfloat16) for heads in (N, K))

    alone = Packed(Places(*(np.zeros((B, n), np.int32) for n in (1, 1, 0, 0))), prompt=T, response=0)

    def loss(q, k, v):
        return attend(q, k, v, alone, sharding.single()).astype(jnp.float32).sum()

    assert flops(loss, q, k, k) == 2 * 2 * B * N * T * T * H
    # The gradient computes the group's weights anew.
    assert flops(jax.grad(loss, argnums=(0, 1, 2)), q, k, k) == 4 * 2 * 2 * B * N * T * T * H
