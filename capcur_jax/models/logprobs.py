"""Log-probabilities and entropy of tokens from hidden states, without the array [tokens, vocabulary].

The vocabulary is walked in blocks: an online softmax forwards, each block's logits once more backwards. Blocks of
tokens would not do: they add up the kernel's gradient in float32, 2.3 GiB for 151,936 x 4,096.

Axes: axes.py. A are all tokens, whatever their leading axes; V is the vocabulary or a block of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from capcur_jax.axes import Array, Float, Int, checked

BLOCK = 4096
_LANES = 128  # of a TPU's registers: slices at multiples of them need no shifting
_LOWEST = float(np.finfo(np.float32).min) / 2  # the maximum of nothing; a difference with it stays finite


class TokenLogprobs(NamedTuple):
    logprobs: jax.Array  # [...] float32, of the given tokens
    entropy: jax.Array  # [...] float32, of the whole distribution, in nats
    greedy: jax.Array  # [...] bool, True where no token is likelier than the given one


class Shards(NamedTuple):
    """How the arguments of `token_logprobs` lie on a mesh; what is split must be divisible by its mesh axes."""

    mesh: Mesh
    tokens: P  # of the tokens; the hidden states lie the same, all of D together
    kernel: P  # of the kernel: its width over axes of the tokens, its vocabulary over others


class _Plan(NamedTuple):
    """What is known when a program is traced."""

    vocabulary_axis: int
    temperature: float
    banned: tuple[int, ...]
    block: int
    shards: Shards | None

    @property
    def kernel(self) -> str:
        """The kernel's axes in an einsum."""
        return "dv" if self.vocabulary_axis else "vd"

    def split(self, letter: str) -> tuple[str, ...]:
        """The mesh axes that split the tokens "t", the kernel's width "d" or its vocabulary "v"."""
        if self.shards is None:
            return ()
        if letter == "t":
            entries = self.shards.tokens
        else:
            entries = ((*self.shards.kernel, None, None)[self.kernel.index(letter)],)
        return tuple(name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry))


def ban(logits: jax.Array, banned: Sequence[int]) -> jax.Array:
    """Logits with -inf at tokens that may not be sampled: in every pass, or sampler and trainer would disagree."""
    if not banned:
        return logits
    allowed = np.ones(logits.shape[-1], bool)
    allowed[list(banned)] = False
    return jnp.where(allowed, logits, -jnp.inf)


@checked
def token_logprobs(
    h: Float[Array, "*A D"],
    kernel: Float[Array, "D V"] | Float[Array, "V D"],
    tokens: Int[Array, "*A"],
    *,
    vocabulary_axis: int = 1,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
    block: int = BLOCK,
    shards: Shards | None = None,
) -> TokenLogprobs:
    """Log-probs of `tokens` [...] under softmax(h [..., D] @ kernel / temperature) with banned tokens left out.

    Every pass (sampler, old, reference, policy) divides by the same temperature (TRL #3029). Matrix products take
    factors of h's dtype and give float32. A banned token's log-prob is -inf and has gradient 0.

    Args:
        kernel: [D, V], or a tied embedding [V, D] with vocabulary_axis=0; cast to h's dtype a block at a time.
        block: about how many tokens of the vocabulary are looked at together; a vocabulary no larger is one block.
        shards: None where a device has all of the kernel. With it the kernel is never gathered: each device walks its
            own part of the vocabulary, and a kernel whose width is split as well is gathered a block at a time.
    """
    plan = _Plan(vocabulary_axis, float(temperature), tuple(map(int, banned)), block, shards)
    if set(plan.split("d")) - set(plan.split("t")) or set(plan.split("v")) & set(plan.split("t")):
        raise ValueError(
            f"the kernel's width must be split over axes of the tokens, its vocabulary over others: {shards}"
        )
    return _token_logprobs(plan, h, kernel, tokens)


# ---------------------------------------------------------------------- blocks


def _block_size(vocabulary: int, block: int) -> int:
    """All of a small vocabulary; else near `block`, and such that little of the last block is left over."""
    if vocabulary <= block:
        return vocabulary
    even = -(-vocabulary // (vocabulary // block))
    lanes = _LANES if block >= _LANES else 1
    return min(-(-even // lanes) * lanes, vocabulary)


def _walk(plan: _Plan, kernel: jax.Array, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`carry = body(number, carry)` for every block of this device's vocabulary, the last block first."""
    vocabulary = kernel.shape[plan.vocabulary_axis]
    count = -(-vocabulary // _block_size(vocabulary, plan.block))
    if count == 1:
        return body(0, carry)
    return jax.lax.fori_loop(0, count, lambda done, carry: body(count - 1 - done, carry), carry)


class _Block(NamedTuple):
    start: jax.Array  # where it lies in this device's vocabulary
    kernel: jax.Array  # [D, V] or [V, D], all of D, in h's dtype
    scaled_AxV: jax.Array  # logits / temperature
    allowed_V: jax.Array  # False at banned tokens and at those that the block before has
    given_AxV: jax.Array  # True at the given tokens, if they are allowed


def _block(plan: _Plan, h_AxD: jax.Array, kernel: jax.Array, tokens_A: jax.Array, number: Any) -> _Block:
    axis, vocabulary = plan.vocabulary_axis, kernel.shape[plan.vocabulary_axis]
    size = _block_size(vocabulary, plan.block)
    # The last block is moved back until it fits. What it then has in common with the one before belongs to that one.
    start = jnp.minimum(number * size, vocabulary - size)
    part = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis).astype(h_AxD.dtype)
    if plan.split("d"):
        part = jax.lax.all_gather(part, plan.split("d"), axis=1 - axis, tiled=True)
    logits = jnp.einsum(f"td,{plan.kernel}->tv", h_AxD, part, preferred_element_type=jnp.float32)
    ids = start + jnp.arange(size)
    allowed = ids >= number * size
    if plan.split("v"):
        ids += jax.lax.axis_index(plan.split("v")) * vocabulary
    if plan.banned:
        allowed &= (ids[:, None] != jnp.array(plan.banned)).all(1)
    return _Block(start, part, logits / plan.temperature, allowed, (tokens_A[:, None] == ids) & allowed)


# ---------------------------------------------------------------------- forwards


class _Sums(NamedTuple):
    """Of the tokens seen so far, [A]; z = logits / temperature."""

    top: jax.Array  # max z
    mass: jax.Array  # sum exp(z - top)
    moment: jax.Array  # sum exp(z - top) (z - top): an entropy that large logits don't cancel out of
    given: jax.Array  # z of the given token, -inf before it is seen

    def moved(self, top: jax.Array) -> _Sums:
        """The same around a larger `top`."""
        by = self.top - top
        return _Sums(top, self.mass * jnp.exp(by), (self.moment + by * self.mass) * jnp.exp(by), self.given)


def _sums(plan: _Plan, h: jax.Array, kernel: jax.Array, tokens: jax.Array) -> _Sums:
    """Over the whole vocabulary, in the tokens' shape."""
    h_AxD, tokens_A = h.reshape(-1, h.shape[-1]), tokens.reshape(-1)

    def body(number, sums: _Sums) -> _Sums:
        block = _block(plan, h_AxD, kernel, tokens_A, number)
        scaled = jnp.where(block.allowed_V, block.scaled_AxV, -jnp.inf)
        sums = sums.moved(jnp.maximum(sums.top, scaled.max(-1)))
        away = scaled - sums.top[:, None]
        weight = jnp.exp(away)
        return _Sums(
            sums.top,
            sums.mass + weight.sum(-1),
            sums.moment + (weight * jnp.where(block.allowed_V, away, 0.0)).sum(-1),  # 0 x -inf is NaN
            jnp.maximum(sums.given, jnp.where(block.given_AxV, scaled, -jnp.inf).max(-1)),
        )

    zero = jnp.zeros(tokens_A.shape, jnp.float32)
    sums = _walk(plan, kernel, body, _Sums(zero + _LOWEST, zero, zero, zero - jnp.inf))
    if split := plan.split("v"):
        sums = sums.moved(jax.lax.pmax(sums.top, split))
        mass, moment = jax.lax.psum((sums.mass, sums.moment), split)
        sums = _Sums(sums.top, mass, moment, jax.lax.pmax(sums.given, split))
    return jax.tree.map(lambda x: x.reshape(tokens.shape), sums)


def _on_mesh(plan: _Plan, function: Callable, arguments: str, results: str) -> Callable:
    """The function for one device's parts; "t" is what lies as tokens do, "k" as the kernel does."""
    function = functools.partial(function, plan)
    if plan.shards is None:
        return function
    specs = {"t": plan.shards.tokens, "k": plan.shards.kernel}
    ins, outs = tuple(specs[a] for a in arguments), tuple(specs[r] for r in results)
    # Unchecked: the sums over mesh axes are all written out here, and shard_map is never differentiated.
    return jax.shard_map(
        function, mesh=plan.shards.mesh, in_specs=ins, out_specs=outs if len(outs) > 1 else outs[0], check_vma=False
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(plan: _Plan, h: jax.Array, kernel: jax.Array, tokens: jax.Array) -> TokenLogprobs:
    return _forward(plan, h, kernel, tokens)[0]


def _forward(plan: _Plan, h: jax.Array, kernel: jax.Array, tokens: jax.Array) -> tuple[TokenLogprobs, tuple]:
    sums: _Sums = _on_mesh(plan, _sums, "tkt", "t")(h, kernel, tokens)
    log_mass = jnp.log(sums.mass)
    entropy = log_mass - sums.moment / sums.mass
    result = TokenLogprobs(sums.given - sums.top - log_mass, entropy, sums.given == sums.top)
    return result, (h, kernel, tokens, sums.top, log_mass, result)


# ---------------------------------------------------------------------- backwards


def _gradients(
    plan: _Plan,
    h: jax.Array,
    kernel: jax.Array,
    tokens: jax.Array,
    top: jax.Array,
    log_mass: jax.Array,
    entropy: jax.Array,
    d_logprobs: jax.Array,
    d_entropy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Of h and kernel: d logp_t / d z_v = [v = t] - p_v and d entropy / d z_v = -p_v (log p_v + entropy)."""
    h_AxD, tokens_A = h.reshape(-1, h.shape[-1]), tokens.reshape(-1)
    columns = (x.reshape(-1, 1) for x in (top, log_mass, entropy, d_logprobs, d_entropy))
    top, log_mass, entropy, d_logprobs, d_entropy = columns

    def body(number, gradients):
        d_h, d_kernel = gradients
        block = _block(plan, h_AxD, kernel, tokens_A, number)
        logprobs = block.scaled_AxV - top - log_mass
        p = jnp.where(block.allowed_V, jnp.exp(logprobs), 0.0)
        d_scaled = d_logprobs * (block.given_AxV - p) - d_entropy * p * (logprobs + entropy)
        d_logits = (d_scaled / plan.temperature).astype(h.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_h += product(f"tv,{plan.kernel}->td", d_logits, block.kernel)
        piece = product(f"td,tv->{plan.kernel}", h_AxD, d_logits)
        if width := plan.split("d"):
            piece = jax.lax.psum_scatter(piece, width, scatter_dimension=1 - plan.vocabulary_axis, tiled=True)
        if others := tuple(name for name in plan.split("t") if name not in width):
            piece = jax.lax.psum(piece, others)
        # The last block came first: where it had nothing to say, the one before overwrites it.
        piece = piece.astype(kernel.dtype)
        return d_h, jax.lax.dynamic_update_slice_in_dim(d_kernel, piece, block.start, plan.vocabulary_axis)

    d_h, d_kernel = _walk(plan, kernel, body, (jnp.zeros(h_AxD.shape, jnp.float32), jnp.zeros_like(kernel)))
    if plan.split("v"):
        d_h = jax.lax.psum(d_h, plan.split("v"))
    return d_h.astype(h.dtype).reshape(h.shape), d_kernel


def _backward(plan: _Plan, saved: tuple, cotangents: TokenLogprobs) -> tuple[jax.Array, jax.Array, None]:
    h, kernel, tokens, top, log_mass, result = saved
    # A banned token's -inf is a constant; what comes back for it may be NaN.
    d_logprobs = jnp.where(jnp.isneginf(result.logprobs), 0.0, cotangents.logprobs)
    gradients = _on_mesh(plan, _gradients, "tktttttt", "tk")
    arguments = h, kernel, tokens, top, log_mass, result.entropy, d_logprobs, cotangents.entropy
    return *gradients(*arguments), None


_token_logprobs.defvjp(_forward, _backward)
