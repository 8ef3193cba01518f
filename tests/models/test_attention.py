"""Attention: every kernel against the plain XLA reference, in values and gradients; which one a program is lowered to.

Kernels run in Pallas' interpret mode, cuDNN's part by jax.nn's XLA one: benchmarks/attention_compile.py compiles both.
Those of packed rows: test_packed.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.models import attention_gpu, attention_tpu
from capcur_jax.models.attention import Causal, Packed, Places, Segments, attend, reference

ODD = 149  # two blocks of 128, the second one mostly padding


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def heads(rows, tokens, query=4, kv=2, size=12, **kinds):
    shapes = [(rows, tokens, n, size) for n in (query, kv, kv)]
    return tuple(normal(*shape, seed=seed, **kinds) for seed, shape in enumerate(shapes))


def alone(kernel):
    return kernel, functools.partial(reference, layout=Causal()), heads(2, ODD)


CASES = {
    "tpu, causal": (alone, functools.partial(attention_tpu.causal, interpret=True)),
    "gpu, causal": (alone, functools.partial(attention_gpu.causal, implementation="xla")),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference_in_values_and_gradients(case):
    setting, kernel = CASES[case]
    ours, theirs, arrays = setting(kernel)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(normal(*out.shape, seed=5))

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), both(ours, arrays), both(theirs, arrays))


def lowered(platform, layout, *, tokens=128, dtype=jnp.bfloat16, implementation="auto", **kinds):
    arrays = heads(2, tokens, kv=4, dtype=dtype, **kinds)
    program = jax.jit(
        functools.partial(attend, layout=layout, mesh=sharding.single(), implementation=implementation)
    ).trace(*arrays)
    return program.lower(lowering_platforms=(platform,)).as_text()


def test_cudnn_gets_even_lengths(monkeypatch):
    """jax refuses odd ones where it differentiates."""
    lengths = []

    def attention(*arrays, **kinds):
        lengths.extend(x.shape[1] for x in arrays)
        return arrays[0]

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    q, k, v = heads(2, ODD)
    assert CASES["gpu, causal"][1](q, k, v).shape == q.shape
    assert lengths == [ODD + 1] * 3


PLACES = Places(  # two rows of 128: two groups of two responses and padding; one group that has one response
    np.array([[0, 48], [0, 0]]), np.array([[20, 7], [90, 0]]),
    np.array([[20, 31, 55, 60], [90, 0, 0, 0]]), np.array([[11, 17, 5, 30], [38, 0, 0, 0]]),
)  # fmt: skip
ROWS = Packed(Places(*(x.astype(np.int32) for x in PLACES)), prompt=96, response=40)
IMAGES = Segments(  # two images and padding; one image
    np.repeat([[1, 2, 0], [1, 1, 1]], [70, 40, 18], axis=1), np.array([[0, 70], [0, 0]], np.int32),
    np.array([[70, 40], [128, 0]], np.int32),
)  # fmt: skip


@pytest.mark.parametrize("layout", [Causal(), ROWS, IMAGES])
def test_the_platform_that_a_program_is_lowered_for_chooses(layout):
    assert "tpu_custom_call" in lowered("tpu", layout)
    assert "custom_call" not in lowered("cpu", layout)
    assert "tpu_custom_call" not in lowered("tpu", layout, implementation="xla")


def test_packed_rows_are_cudnns_where_it_takes_their_heads():
    assert lowered("cuda", ROWS, size=16).count("__cudnn$fmhaSoftmax") == 2
    assert "__cudnn" not in lowered("cuda", ROWS, size=12)
    assert "__cudnn" not in lowered("cuda", ROWS, size=16, dtype=jnp.float32)


def seen_in_packed_rows(places: Places, length: int) -> np.ndarray:
    """[A, L, L], by a loop over the groups; a token of padding sees itself."""
    seen = np.tile(np.eye(length, dtype=bool), (len(places.prompt_start), 1, 1))
    group = places.response_start.shape[1] // places.prompt_start.shape[1]
    for a, r in np.ndindex(places.response_start.shape):
        prompt, n = places.prompt_start[a, r // group], places.prompt_length[a, r // group]
        own, m = places.response_start[a, r], places.response_length[a, r]
        for query in range(prompt, prompt + n):
            seen[a, query, prompt : query + 1] = True
        for query in range(own, own + m):
            seen[a, query, prompt : prompt + n] = seen[a, query, own : query + 1] = True
    return seen


@pytest.mark.parametrize("longest", [16, 17, 38])
def test_packed_rows_see_their_prompt_and_their_own_response(longest):
    """Values and gradients of a softmax over a dense mask, in float64; one compiled length of responses is enough, the
    next one is needed, the longest is."""
    q, k, v = heads(2, 128)
    places = PLACES._replace(response_length=np.minimum(PLACES.response_length, longest))
    seen, real = seen_in_packed_rows(places, 128), np.zeros((2, 128), bool)
    for starts, lengths in (places[:2], places[2:]):
        for a, i in np.ndindex(starts.shape):
            real[a, starts[a, i] : starts[a, i] + lengths[a, i]] = True

    def dense(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("aqnh,aknh->anqk", q, k) / np.sqrt(12)
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -np.inf), axis=-1)
        return jnp.einsum("anqk,aknh->aqnh", weights, v)

    def both(function, arrays):
        weights = normal(*q.shape, seed=5) * real[..., None, None]
        value = lambda *arrays: (function(*arrays) * weights).sum()  # noqa: E731
        return jnp.where(real[..., None, None], function(*arrays), 0), jax.grad(value, (0, 1, 2))(*arrays)

    layout = ROWS._replace(places=Places(*(x.astype(np.int32) for x in places)))
    ours = jax.jit(functools.partial(both, functools.partial(attend, layout=layout, mesh=sharding.single())))
    with jax.enable_x64(True):
        want = jax.device_get(both(dense, tuple(x.astype(jnp.float64) for x in (q, k, v))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), ours((q, k, v)), want)


def test_what_xla_does_as_well_or_exactly_stays_with_xla():
    assert "tpu_custom_call" not in lowered("tpu", Causal(), dtype=jnp.float32)
    assert "tpu_custom_call" not in lowered("tpu", Causal(), tokens=64)
    assert "tpu_custom_call" not in lowered("tpu", Segments(jnp.zeros((2, 128), jnp.int32), reach=16))


def test_choosing_by_platform_is_the_reference_itself_on_a_cpu():
    """Under a scan with rematerialisation, differentiated: the same bits."""
    arrays = heads(2, 128, dtype=jnp.bfloat16)

    def loss(q, k, v, function):
        body = jax.checkpoint(lambda q, _: (function(q, k, v, Causal()), None))
        return jax.lax.scan(body, q, length=2)[0].astype(jnp.float32).var()

    ours = functools.partial(attend, mesh=sharding.single())
    ours, theirs = (jax.jit(jax.grad(functools.partial(loss, function=f)))(*arrays) for f in (ours, reference))
    np.testing.assert_array_equal(ours, theirs)


def test_an_unknown_implementation_names_the_key():
    with pytest.raises(InputError, match=r"config\.model\.attention = 'flash'; choose one of auto, xla"):
        attend(*heads(1, 8), Causal(), sharding.single(), "flash")
