"""Attention: packed rows, with responses and of prompts alone, against a softmax over a dense mask, in values and
gradients; which kernel a program is lowered to.

Kernels run in Pallas' interpret mode, cuDNN's calls by their twin in plain XLA: benchmarks/attention_compile.py
compiles both. More of them: test_packed.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capcur_jax.devices import sharding
from capcur_jax.errors import InputError
from capcur_jax.models import packed_gpu, packed_tpu
from capcur_jax.models.attention import Packed, Places, Segments, attend, reference

ODD = 149  # two blocks of 128, the second one mostly padding


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def heads(rows, tokens, query=4, kv=2, size=12, **kinds):
    shapes = [(rows, tokens, n, size) for n in (query, kv, kv)]
    return tuple(normal(*shape, seed=seed, **kinds) for seed, shape in enumerate(shapes))


def lowered(platform, layout, *, tokens=128, dtype=jnp.bfloat16, implementation="auto", **kinds):
    arrays = heads(2, tokens, kv=4, dtype=dtype, **kinds)
    program = jax.jit(
        functools.partial(attend, layout=layout, mesh=sharding.single(), implementation=implementation)
    ).trace(*arrays)
    return program.lower(lowering_platforms=(platform,)).as_text()


PLACES = Places(  # two rows of 128: two groups of two responses and padding; one group that has one response
    np.array([[0, 48], [0, 0]]), np.array([[20, 7], [90, 0]]),
    np.array([[20, 31, 55, 60], [90, 0, 0, 0]]), np.array([[11, 17, 5, 30], [38, 0, 0, 0]]),
)  # fmt: skip
PROMPTS = Places(  # two rows of 149: three prompts, one absent; one
    np.array([[0, 60, 0, 84], [0, 0, 0, 0]]), np.array([[60, 24, 0, 40], [7, 0, 0, 0]]),
    np.zeros((2, 0)), np.zeros((2, 0)),
)  # fmt: skip
ROWS = Packed(Places(*(x.astype(np.int32) for x in PLACES)), prompt=96, response=40)
ALONE = Packed(Places(*(x.astype(np.int32) for x in PROMPTS)), prompt=60, response=0)
IMAGES = Segments(  # two images and padding; one image
    np.repeat([[1, 2, 0], [1, 1, 1]], [70, 40, 18], axis=1), np.array([[0, 70], [0, 0]], np.int32),
    np.array([[70, 40], [128, 0]], np.int32),
)  # fmt: skip


@pytest.mark.parametrize("layout", [ALONE, ROWS, IMAGES])
def test_the_platform_that_a_program_is_lowered_for_chooses(layout):
    assert "tpu_custom_call" in lowered("tpu", layout)
    assert "custom_call" not in lowered("cpu", layout)
    assert "tpu_custom_call" not in lowered("tpu", layout, implementation="xla")


def test_packed_rows_are_cudnns_where_it_takes_their_heads():
    assert lowered("cuda", ROWS, size=16).count("__cudnn$fmhaSoftmax") == 2
    assert lowered("cuda", ALONE, size=16).count("__cudnn$fmhaSoftmax") == 1  # no response looks back
    assert "__cudnn" not in lowered("cuda", ROWS, size=12)
    assert "__cudnn" not in lowered("cuda", ROWS, size=16, dtype=jnp.float32)


def seen_in_packed_rows(places: Places, length: int) -> np.ndarray:
    """[A, L, L], by a loop over the groups; a token of padding sees itself."""
    seen = np.tile(np.eye(length, dtype=bool), (len(places.prompt_start), 1, 1))
    group = places.response_start.shape[1] // places.prompt_start.shape[1]
    for a, b in np.ndindex(places.prompt_start.shape):
        prompt, n = places.prompt_start[a, b], places.prompt_length[a, b]
        for query in range(prompt, prompt + n):
            seen[a, query, prompt : query + 1] = True
        for r in range(b * group, (b + 1) * group):
            own, m = places.response_start[a, r], places.response_length[a, r]
            for query in range(own, own + m):
                seen[a, query, prompt : prompt + n] = seen[a, query, own : query + 1] = True
    return seen


def check_dense(function, layout: Packed, length: int) -> None:
    """Values and gradients are those of a softmax over a dense mask, in float64, wherever a token lies."""
    q, k, v = heads(2, length)
    places = layout.places
    seen, real = seen_in_packed_rows(places, length), np.zeros((2, length), bool)
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

    ours = jax.jit(functools.partial(both, functools.partial(function, layout=layout)))
    with jax.enable_x64(True):
        want = jax.device_get(both(dense, tuple(x.astype(jnp.float64) for x in (q, k, v))))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), ours((q, k, v)), want)


@pytest.mark.parametrize("longest", [16, 17, 38])
def test_packed_rows_see_their_prompt_and_their_own_response(longest):
    """One compiled length of responses is enough, the next one is needed, the longest is."""
    lengths = np.minimum(ROWS.places.response_length, longest)
    layout = ROWS._replace(places=ROWS.places._replace(response_length=lengths))
    check_dense(functools.partial(attend, mesh=sharding.single()), layout, 128)


WAYS = {
    "attend": functools.partial(attend, mesh=sharding.single()),
    "reference": reference,
    "gpu": functools.partial(packed_gpu.packed, implementation="xla"),
    "tpu": functools.partial(packed_tpu.packed, interpret=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("longest", [24, 25, 60])
def test_prompts_alone_see_themselves(way, longest):
    """Likewise of prompts, where nobody responds."""
    lengths = np.minimum(ALONE.places.prompt_length, longest)
    check_dense(WAYS[way], ALONE._replace(places=ALONE.places._replace(prompt_length=lengths)), ODD)


@pytest.mark.parametrize("way", WAYS)
def test_a_bound_on_prompts_may_pass_the_row(way):
    """It is that of all declared rows; a short one has the same."""
    check_dense(WAYS[way], ALONE._replace(prompt=4 * ODD), ODD)


@pytest.mark.parametrize(
    ("length", "bound", "read"),
    [(1, 60, 24), (24, 60, 24), (25, 60, 40), (40, 60, 40), (41, 60, 60), (60, 60, 60), (7, 9 * ODD, 56)],
)
def test_a_short_prompt_takes_the_shorter_compiled_length(length, bound, read):
    """NaN in the values behind it shows how far the program reads. A row is a bound, too."""
    places = ALONE.places._replace(prompt_length=np.array([[length, 0, 0, 0], [0, 0, 0, 0]], np.int32))
    function = jax.jit(functools.partial(reference, layout=Packed(places, bound, 0)))
    q, k, v = heads(2, ODD)
    found = [function(q, k, v.at[:, at:].set(jnp.nan))[0, :length] for at in (read, read - 1)]
    assert [bool(jnp.isnan(x).any()) for x in found] == [False, True]


def test_absent_prompts_are_not_computed():
    nobody = ALONE._replace(places=jax.tree.map(np.zeros_like, ALONE.places))
    nan = [jnp.full_like(x, jnp.nan) for x in heads(2, ODD)]
    np.testing.assert_array_equal(jax.jit(functools.partial(reference, layout=nobody))(*nan), 0)


def test_what_xla_does_as_well_or_exactly_stays_with_xla():
    assert "tpu_custom_call" not in lowered("tpu", ROWS, dtype=jnp.float32)
    assert "tpu_custom_call" not in lowered("tpu", ROWS, tokens=64)
    assert "tpu_custom_call" not in lowered("tpu", Segments(jnp.zeros((2, 128), jnp.int32), reach=16))


def test_choosing_by_platform_is_the_reference_itself_on_a_cpu():
    """Under a scan with rematerialisation, differentiated: the same bits."""
    arrays = heads(2, 128, dtype=jnp.bfloat16)

    def loss(q, k, v, function):
        body = jax.checkpoint(lambda q, _: (function(q, k, v, ROWS), None))
        return jax.lax.scan(body, q, length=2)[0].astype(jnp.float32).var()

    ours = functools.partial(attend, mesh=sharding.single())
    ours, theirs = (jax.jit(jax.grad(functools.partial(loss, function=f)))(*arrays) for f in (ours, reference))
    np.testing.assert_array_equal(ours, theirs)


def test_an_unknown_implementation_names_the_key():
    with pytest.raises(InputError, match=r"config\.model\.attention = 'flash'; choose one of auto, xla"):
        attend(*heads(2, 128), ROWS, sharding.single(), "flash")
