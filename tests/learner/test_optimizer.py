"""AdamW against PyTorch's, and what bfloat16 parameters and moments lose: with compensation nothing, without it all."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict

from capcur_jax.errors import InputError
from capcur_jax.learner.optimizer import AdamWState, _join, _split, make_optimizer, state_sharding

RATE = 1e-6  # the paper's


def settings(**changed) -> ConfigDict:
    config = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "weight_decay": 0.01, "max_gradient_norm": 0.0}
    return ConfigDict({**config, "moments": "float32", "parameters": "float32", **changed})


def tree(random, dtype=np.float32, scale=1.0):
    shapes = {"kernel": (3, 4, 5), "bias": (7,), "deep": {"scalar": ()}}
    drawn = jax.tree.map(
        lambda shape: jnp.asarray(scale * random.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return {**drawn, "zero": jnp.zeros(6, dtype)}


def stepper(optimizer):
    @jax.jit
    def step(parameters, state, gradients, rate):
        updates, state = optimizer.update(gradients, optax.tree.set(state, learning_rate=rate), parameters)
        return optax.apply_updates(parameters, updates), state

    return step


def exact(parameters, state):
    """The float32 parameters of bfloat16 ones and their compensation, by integer arithmetic in numpy."""

    def one(parameter, low):
        high = np.asarray(parameter).view(np.uint16).astype(np.int64) << 16
        return ((high + np.asarray(low)) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)

    return jax.tree.map(one, parameters, state.compensation)


# ---------------------------------------------------------------------- float32


@pytest.mark.parametrize("most", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_equal_pytorch_s(most, dtype):
    """Of float32 parameters, and of bfloat16 ones with their compensation: PyTorch's are float32 either way."""
    random = np.random.default_rng(0)
    chosen = settings(max_gradient_norm=most, beta1=0.8, beta2=0.97, weight_decay=0.1, parameters=dtype)
    parameters = tree(random, jnp.dtype(dtype))
    optimizer = make_optimizer(chosen)
    state, step = optimizer.init(parameters), stepper(optimizer)
    theirs = [torch.nn.Parameter(torch.tensor(np.array(leaf, np.float32))) for leaf in jax.tree.leaves(parameters)]
    adamw = torch.optim.AdamW(theirs, betas=(0.8, 0.97), eps=1e-8, weight_decay=0.1)
    for rate in (1e-2, 3e-3, 1e-3, 1e-2):
        gradients = tree(random, scale=random.uniform(0.1, 3))
        for parameter, gradient in zip(theirs, jax.tree.leaves(gradients), strict=True):
            parameter.grad = torch.tensor(np.array(gradient))
        if most:
            torch.nn.utils.clip_grad_norm_(theirs, most)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        parameters, state = step(parameters, state, gradients, rate)
    ours = exact(parameters, state) if dtype == "bfloat16" else parameters
    for mine, other in zip(jax.tree.leaves(ours), theirs, strict=True):
        np.testing.assert_allclose(mine, other.detach().numpy(), rtol=1e-5, atol=1e-7)
    assert state.count == 4 and state.learning_rate == np.float32(1e-2)


def test_the_clip_looks_at_the_float32_norm_of_all():
    """A bfloat16 sum of 10,000 equal squares stops at 256 of them; gradients of other types are the same numbers."""
    parameters = {"a": jnp.zeros(10_000, jnp.bfloat16), "b": jnp.zeros(1, jnp.bfloat16)}
    optimizer = make_optimizer(settings(max_gradient_norm=1.0, parameters="bfloat16"))
    gradients = {"a": jnp.ones(10_000), "b": jnp.full(1, 100.0)}
    for dtype in (jnp.float32, jnp.bfloat16):
        given = jax.tree.map(lambda g, dtype=dtype: g.astype(dtype), gradients)
        _, state = stepper(optimizer)(parameters, optimizer.init(parameters), given, 0.0)
        np.testing.assert_allclose(state.mu["a"], 0.1 / np.sqrt(20_000), rtol=1e-5)
        np.testing.assert_allclose(state.mu["b"], 10 / np.sqrt(20_000), rtol=1e-5)


def test_a_norm_that_is_no_number_is_not_hidden():
    """The trainer leaves out updates that are not finite: the clip must not turn them into zeros."""
    optimizer = make_optimizer(settings(max_gradient_norm=1.0))
    parameters = {"a": jnp.ones(3), "b": jnp.ones(2)}
    for bad in (np.nan, np.inf):
        gradients = {"a": jnp.array([1.0, bad, 1.0]), "b": jnp.ones(2)}
        updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
        assert not np.isfinite(updates["a"]).all()


# ---------------------------------------------------------------------- bfloat16 parameters


@pytest.fixture(scope="module")
def long_runs():
    """2,000 steps of 1e-6 on weights of size 0.001 to 2, gradients nearly constant: the starts, and where each way of
    keeping parameters leads: float32, plain bfloat16, compensated, compensated with bfloat16 moments."""
    random = np.random.default_rng(0)
    start = jnp.asarray(random.choice([-1, 1], 4000) * 10 ** random.uniform(-3, 0.3, 4000), jnp.bfloat16)
    means = jnp.asarray(random.choice([-1, 1], 4000) * 10 ** random.uniform(-2, 0, 4000), jnp.float32)

    def run(optimizer, parameters, seen=lambda parameters: parameters):
        def body(carry, key):
            parameters, state = carry
            gradients = means * (1 + 0.3 * jax.random.normal(key, means.shape))
            state = optax.tree.set(state, learning_rate=jnp.float32(RATE))
            updates, state = optimizer.update(gradients, state, seen(parameters))
            return (optax.apply_updates(parameters, updates), state), None

        carry = (parameters, optimizer.init(seen(parameters)))
        return jax.jit(lambda c: jax.lax.scan(body, c, jax.random.split(jax.random.key(0), 2000))[0])(carry)

    return start, {
        "float32": run(make_optimizer(settings()), start.astype(jnp.float32)),
        "plain": run(make_optimizer(settings()), start, seen=lambda p: p.astype(jnp.float32)),
        "compensated": run(make_optimizer(settings(parameters="bfloat16")), start),
        "half": run(make_optimizer(settings(parameters="bfloat16", moments="bfloat16")), start),
    }


def test_compensated_bfloat16_follows_float32_and_plain_bfloat16_stays_put(long_runs):
    start, runs = long_runs
    start = np.asarray(start, np.float32)
    moved = np.asarray(runs["float32"][0]) - start
    assert np.abs(moved).min() > 1.7e-3 and np.abs(moved).max() < 2.1e-3
    # Plain: the very same steps are less than half a bfloat16 digit of any of these weights.
    assert (np.asarray(runs["plain"][0], np.float32) == start).all() and runs["plain"][1].count == 2000
    # Compensated: the float32 run to its last bits, and the parameters are that, rounded.
    parameters, state = runs["compensated"]
    np.testing.assert_allclose(exact(parameters, state), runs["float32"][0], atol=5e-6 * RATE * 2000, rtol=1e-6)
    assert parameters.dtype == jnp.bfloat16
    near = np.abs(np.asarray(parameters, np.float32) - np.asarray(runs["float32"][0]))
    assert (near <= 2**-8 * np.abs(runs["float32"][0]) + 1e-6).all()
    seen = np.abs(start) < 0.45  # half a digit of what is larger is more than the whole way
    assert (np.asarray(parameters, np.float32) != start)[seen].all()
    # With moments in bfloat16, too: each weight's path differs by a few steps of 2,000.
    parameters, state = runs["half"]
    error = (exact(parameters, state) - np.asarray(runs["float32"][0])) / moved
    assert np.abs(error).max() < 0.05 and abs(error.mean()) < 2e-3 and np.abs(error).max() > 0


def test_the_low_half_is_exact_for_any_numbers():
    """Parameters and steps of any sizes and signs: the sum is exact and nothing is left behind but float32's rounding.

    With both betas 0, no weight decay and epsilon 0, a step is the learning rate times the gradient's sign.
    """
    random = np.random.default_rng(0)
    optimizer = make_optimizer(settings(beta1=0.0, beta2=0.0, weight_decay=0.0, epsilon=0.0, parameters="bfloat16"))
    step = stepper(optimizer)
    signs = random.choice([-1, 1], 5000)
    parameters = jnp.asarray(signs * 2.0 ** random.uniform(-60, 20, 5000), jnp.bfloat16)
    parameters = parameters.at[:3].set(jnp.array([0.0, -0.0, 1.0], jnp.bfloat16))
    state, master = optimizer.init(parameters), np.asarray(parameters, np.float32)
    for number in range(60):
        gradients = jnp.asarray(random.choice([-1.0, 1.0], 5000), jnp.float32)
        rate = np.float32(2.0 ** random.uniform(-40, 10))
        parameters, state = step(parameters, state, gradients, rate)
        master = master - rate * np.asarray(gradients)
        ours = exact(parameters, state)
        np.testing.assert_array_equal(ours, master, err_msg=str(number))
        rounded = np.asarray(parameters, np.float32)
        assert (np.abs(rounded - master) <= np.abs(jnp.asarray(master, jnp.bfloat16).astype(np.float32) - master)).all()


def test_a_parameter_that_all_but_vanishes_goes_on_from_where_the_sum_leads():
    """What a fused multiply-add can leave of 1 is nearer to 0 than any float32 difference."""
    random = np.random.default_rng(0)
    parameters = jnp.asarray(random.choice([-1.0, 1.0], 2000), jnp.bfloat16)
    master = jnp.asarray(random.choice([-1, 1], 2000) * 10 ** random.uniform(-20, -4, 2000), jnp.float32)
    change, low = _split(parameters, master)
    applied = optax.apply_updates(parameters, change)
    assert (np.asarray(applied, np.float32) == 0).any()  # not where the master is
    np.testing.assert_allclose(_join(applied, low), master, rtol=0, atol=2**-23)  # a digit of 1


# ---------------------------------------------------------------------- bfloat16 moments


def test_moments_in_bfloat16_rise_and_fall():
    """Round to nearest, 0.999 x v is v. Here the second moment follows gradients that become smaller, in the mean."""
    shape = (4000,)
    found = {}
    for moments in ("float32", "bfloat16"):
        optimizer = make_optimizer(settings(moments=moments))
        parameters = jnp.zeros(shape)
        body = lambda s, g, o=optimizer, p=parameters: (o.update(jnp.full(shape, g), s, p)[1], None)  # noqa: E731
        gradients = jnp.repeat(jnp.array([1.0, 0.1]), 1000)
        found[moments] = jax.jit(lambda s, b=body, g=gradients: jax.lax.scan(b, s, g)[0])(optimizer.init(parameters))
    want = 0.632304575 * 0.999**1000 + 0.01 * (1 - 0.999**1000)
    assert float(found["float32"].nu.mean()) == pytest.approx(want, rel=1e-4)
    half = np.asarray(found["bfloat16"].nu, np.float32)
    assert half.mean() == pytest.approx(want, rel=5e-3) and half.std() > 0
    assert np.abs(half / want - 1).max() < 0.5
    assert np.asarray(found["bfloat16"].mu, np.float32).mean() == pytest.approx(0.1, rel=5e-3)
    # To nearest: 0.999 of a bfloat16 number is that number, for every one of them.
    every = jnp.arange(128, 256).astype(jnp.bfloat16)
    assert ((every.astype(jnp.float32) * 0.999).astype(jnp.bfloat16) == every).all()


def test_rounding_is_the_same_in_every_run_and_other_in_every_step_and_leaf():
    optimizer = make_optimizer(settings(moments="bfloat16"))
    parameters = {"a": jnp.zeros(500), "b": jnp.zeros(500)}
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 0.1), parameters)
    step = stepper(optimizer)
    states = [step(parameters, optimizer.init(parameters), gradients, 0.0)[1] for _ in range(2)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *states))
    later = step(parameters, optimizer.init(parameters)._replace(count=jnp.int32(5)), gradients, 0.0)[1]
    ups = [np.asarray(m, np.float32) > 0.01 for m in (states[0].mu["a"], states[0].mu["b"], later.mu["a"])]
    second = np.asarray(states[0].nu["a"], np.float32) > 1e-5
    for mask in (*ups, second):
        assert 0 < mask.sum() < 500
    pairs = [(ups[0], ups[1]), (ups[0], ups[2]), (ups[0], second)]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.2


# ---------------------------------------------------------------------- the state


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_the_state_is_arrays_of_the_parameters_shapes_and_scalars(moments, kept):
    parameters = tree(np.random.default_rng(0), jnp.dtype(kept))
    optimizer = make_optimizer(settings(moments=moments, parameters=kept))
    state = optimizer.init(parameters)
    after = stepper(optimizer)(parameters, state, tree(np.random.default_rng(1)), 1e-3)[1]
    for one in (state, after):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(one))
        kinds = {"mu": moments, "nu": moments} | ({"compensation": "int16"} if kept == "bfloat16" else {})
        for field, dtype in kinds.items():
            own = getattr(one, field)
            assert jax.tree.structure(own) == jax.tree.structure(parameters)
            assert [leaf.shape for leaf in jax.tree.leaves(own)] == [p.shape for p in jax.tree.leaves(parameters)]
            assert {leaf.dtype.name for leaf in jax.tree.leaves(own)} == {dtype}
        assert len(jax.tree.leaves(one)) == 2 + len(kinds) * len(jax.tree.leaves(parameters))
        assert one.count.shape == one.learning_rate.shape == ()
    # Nothing changes its type from step to step: a compiled step fits the next.
    assert jax.tree.map(lambda x: x.aval, state) == jax.tree.map(lambda x: x.aval, after)


def test_shardings_of_the_state_are_the_parameters():
    parameters = tree(np.random.default_rng(0), jnp.bfloat16)
    places = jax.tree.map(lambda p: f"where {p.shape} lives", parameters)
    for kept in ("float32", "bfloat16"):
        optimizer = make_optimizer(settings(parameters=kept))
        typed = jax.tree.map(lambda p, kept=kept: p.astype(kept), parameters)
        shapes = jax.eval_shape(optimizer.init, typed)
        found = state_sharding(shapes, places, "everywhere")
        assert jax.tree.structure(found) == jax.tree.structure(shapes)
        assert found == AdamWState("everywhere", "everywhere", places, places, places if kept == "bfloat16" else ())


LAYOUTS = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from ml_collections import ConfigDict
from capcur_jax.learner.optimizer import make_optimizer, state_sharding
settings = ConfigDict(dict(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_gradient_norm=0.0,
                           moments="bfloat16", parameters="bfloat16"))
optimizer, random = make_optimizer(settings), np.random.default_rng(0)
start = {"kernel": random.standard_normal((3, 8, 16)), "bias": random.standard_normal(8)}
gradients = [jax.tree.map(lambda p: np.float32(random.standard_normal(p.shape)), start) for _ in range(3)]
found = []
for sizes, axes in (((1, 1), ("a", "b")), ((4, 2), ("a", "b")), ((2, 4), ("b", "a"))):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes), axes)
    places = {"kernel": NamedSharding(mesh, P(None, "a", "b")), "bias": NamedSharding(mesh, P(("a", "b")))}
    parameters = jax.device_put(jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), start), places)
    shapes = jax.eval_shape(optimizer.init, parameters)
    where = state_sharding(shapes, places, NamedSharding(mesh, P()))
    state = jax.jit(optimizer.init, out_shardings=where)(parameters)

    def step(parameters, state, gradients):
        updates, state = optimizer.update(gradients, optax.tree.set(state, learning_rate=1e-4), parameters)
        return optax.apply_updates(parameters, updates), state

    step = jax.jit(step, in_shardings=(places, where, places), out_shardings=(places, where), donate_argnums=(0, 1))
    for gradient in gradients:
        parameters, state = step(parameters, state, jax.device_put(gradient, places))
    for field in (state.mu, state.nu, state.compensation):
        assert {k: v.sharding for k, v in field.items()} == places
    found.append(jax.tree.map(np.asarray, (parameters, state)))
for other in found[1:]:
    assert jax.tree.all(jax.tree.map(np.array_equal, found[0], other))
"""


def test_every_layout_gives_the_same_bits():
    """8 devices, two meshes against one device, in bfloat16 throughout: rounding does not depend on shards."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "-c", LAYOUTS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize("key", ["moments", "parameters"])
def test_an_unknown_dtype_names_its_key(key):
    with pytest.raises(InputError, match=rf"config\.optimizer\.{key} = 'float16'; choose one of float32, bfloat16"):
        make_optimizer(settings(**{key: "float16"}))


def test_parameters_of_another_dtype_are_refused():
    """Bfloat16 parameters without compensation would stay put, silently."""
    with pytest.raises(ValueError, match=r"'float32', but some are in \{'bfloat16'\}"):
        make_optimizer(settings()).init({"a": jnp.zeros(2, jnp.bfloat16), "b": jnp.zeros(2)})
