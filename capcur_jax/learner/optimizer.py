"""AdamW behind a global-norm clip, for the parameters that are trained: in float32, or in bfloat16 with compensation.

The paper's release trains bfloat16 parameters with EasyR1's AnyPrecisionAdamW (from torchdistx): bfloat16 moments, and
a bfloat16 compensation to which a step is added first, then moved to the parameter as far as the parameter can show it.
The memory is the same here, 2 bytes a number for each of the four, but three things that are lost there are kept here:

- Its compensation rounds too: 8 bits below the parameter's 8. At a learning rate of 1e-6 it stops where the parameter
  is of size 0.5 or more, before the parameter ever moves. Ours is an integer, the low half of the float32 parameter
  whose high half, rounded, is the bfloat16 parameter: together they are the float32 parameter, bit for bit.
- Its weight decay multiplies the bfloat16 parameter by 1 - 1e-8, which is 1. Ours is part of the float32 step.
- Its moments round to nearest: 0.999 x v is v in bfloat16, so that the second moment never falls. Ours round
  stochastically: they are right in expectation. The step itself is taken with the moments before they are rounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from capcur_jax.errors import InputError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class AdamWState(NamedTuple):
    """Arrays only: two scalars, and trees with the parameters' structure and shapes."""

    count: jax.Array  # int32: steps taken
    learning_rate: jax.Array  # float32: of the next step; `optax.tree.set(state, learning_rate=...)`
    mu: Any  # first moments, in `moments`
    nu: Any  # second moments
    compensation: Any  # int16: the low half of the float32 parameters; () where these are float32 themselves


def make_optimizer(settings: ConfigDict) -> optax.GradientTransformation:
    """AdamW (decoupled weight decay, bias correction) after a clip of the gradients' global norm, all in float32.

    Gradients may have any float type, float32 where they were accumulated; `optax.apply_updates(parameters, updates)`
    is exact: with bfloat16 parameters it gives the very parameters that the compensation belongs to. Rounding of
    moments depends on the number of the step and the place in the tree alone, not on how arrays are sharded.

    Args:
        settings: `max_gradient_norm` (0: no clip), `beta1`, `beta2`, `epsilon`, `weight_decay`, `moments` and
            `parameters` ("float32" or "bfloat16": the dtype of both moments, and of the parameters given).

    Raises:
        InputError: `moments` or `parameters` is something else.
    """
    for key in ("moments", "parameters"):
        if settings[key] not in DTYPES:
            raise InputError(f"config.optimizer.{key} = {settings[key]!r}; choose one of {', '.join(DTYPES)}")
    moments, kept = DTYPES[settings.moments], DTYPES[settings.parameters]
    compensated = kept == jnp.bfloat16

    def init(parameters) -> AdamWState:
        if wrong := {leaf.dtype.name for leaf in jax.tree.leaves(parameters)} - {settings.parameters}:
            raise ValueError(f"config.optimizer.parameters = {settings.parameters!r}, but some are in {wrong}")

        def zeros(dtype):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), parameters)

        return AdamWState(
            count=jnp.zeros((), jnp.int32),
            learning_rate=jnp.zeros((), jnp.float32),
            mu=zeros(moments),
            nu=zeros(moments),
            compensation=zeros(jnp.int16) if compensated else (),
        )

    def update(gradients, state: AdamWState, parameters):
        count = optax.safe_increment(state.count)
        rate = jnp.asarray(state.learning_rate, jnp.float32)
        first, second = (1 - beta ** count.astype(jnp.float32) for beta in (settings.beta1, settings.beta2))
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        scale = _clip(gradients, settings.max_gradient_norm)
        noise = jax.random.fold_in(jax.random.key(0), count)

        def one(number, gradient, mu, nu, parameter, low):
            gradient = gradient * scale
            mu = settings.beta1 * mu.astype(jnp.float32) + (1 - settings.beta1) * gradient
            nu = settings.beta2 * nu.astype(jnp.float32) + (1 - settings.beta2) * jnp.square(gradient)
            master = _join(parameter, low) if compensated else parameter
            step = mu / first / (jnp.sqrt(nu / second) + settings.epsilon) + settings.weight_decay * master
            change = -rate * step
            if compensated:
                change, low = _split(parameter, master + change)
            if moments == jnp.bfloat16:
                bits = jax.random.bits(jax.random.fold_in(noise, number), mu.shape, jnp.uint32)
                mu, nu = _rounded(mu, bits & 0xFFFF), _rounded(nu, bits >> 16)
            return change, mu, nu, low

        leaves, structure = jax.tree.flatten(gradients)
        low = jax.tree.leaves(state.compensation) if compensated else [()] * len(leaves)
        trees = (leaves, *map(jax.tree.leaves, (state.mu, state.nu, parameters)), low)
        new = [one(number, *of) for number, of in enumerate(zip(*trees, strict=True))]
        changes, mu, nu, low = (jax.tree.unflatten(structure, part) for part in zip(*new, strict=True))
        return changes, AdamWState(count, rate, mu, nu, low if compensated else ())

    return optax.GradientTransformation(init, update)


def state_sharding(state: AdamWState, parameters: Any, replicated: jax.sharding.Sharding) -> AdamWState:
    """Where each array of an optimizer's state lives.

    Args:
        state: a state, or its shapes (`jax.eval_shape(optimizer.init, parameters)`).
        parameters: the shardings of the trained parameters, in a tree of their structure.
        replicated: the sharding of scalars.
    """
    compensation = parameters if jax.tree.leaves(state.compensation) else ()
    return AdamWState(replicated, replicated, parameters, parameters, compensation)


def _clip(gradients: Any, most: float) -> jax.Array | float:
    """What to multiply the gradients with so that their global norm is at most `most`; 0: any norm."""
    if not most:
        return 1.0
    norm = optax.global_norm(gradients)
    return jnp.where(norm < most, 1.0, most / norm)


def _join(parameter: jax.Array, low: jax.Array) -> jax.Array:
    """The float32 parameter: the bfloat16 one is its high half, rounded, `low` (signed) what that rounding left."""
    high = jax.lax.bitcast_convert_type(parameter, jnp.uint16).astype(jnp.uint32)
    low = jax.lax.bitcast_convert_type(low.astype(jnp.int32), jnp.uint32)
    return jax.lax.bitcast_convert_type((high << 16) + low, jnp.float32)


def _split(parameter: jax.Array, master: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(change, low): `parameter` + change, in float32, is the bfloat16 number next to `master`; low is the rest.

    Half-way numbers are rounded away from zero, so that the rest fits a signed 16-bit number.
    """
    bits = jax.lax.bitcast_convert_type(master, jnp.uint32)
    target = _high(bits + 0x8000).astype(jnp.float32)
    low = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.int16)
    old = parameter.astype(jnp.float32)
    change = target - old
    # A fused multiply-add may leave less than 1/65536 of a parameter: no float32 difference leads there. The parameter
    # then goes on from where the sum does lead, without a rest: the rest of another number beside 0 could be NaN.
    return change, jnp.where(old + change == target, low, 0)


def _rounded(x: jax.Array, random: jax.Array) -> jax.Array:
    """`x` as bfloat16, up or down with the probability of the distance; `random`: 16 random bits in a uint32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(jnp.isfinite(x), _high(bits + random), x.astype(jnp.bfloat16))


def _high(bits: jax.Array) -> jax.Array:
    """The bfloat16 number that is the high half of a float32 one, given as a uint32."""
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
