"""The embedded engine: JAX, in this process, reading the trainer's own parameters between updates.

A group's prompt is prefilled once; its responses decode in lockstep, one jitted loop for a batch, until every row has
ended. Shapes come from declared buckets, so a warmed-up engine never compiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from capcur_jax import distributed, sharding
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.logprobs import ban
from capcur_jax.models.qwen_vl import PromptBatch, QwenVL
from capcur_jax.models.text import KeysValues
from capcur_jax.programs import Programs
from capcur_jax.rollout.engine import Sample, Sampling


class _State(NamedTuple):
    step: jax.Array
    logits: jax.Array  # [R, V] for the next token
    cache: KeysValues
    tokens: jax.Array  # [R, T]
    logprobs: jax.Array  # [R, T]
    lengths: jax.Array  # [R]
    done: jax.Array  # [R]


def nucleus(logits_RxV: jax.Array, top_p: float) -> jax.Array:
    """Logits with everything outside the smallest set of mass `top_p` at -inf; the likeliest token always stays."""
    order = jnp.sort(logits_RxV, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1)
    kept = jnp.sum(mass - jax.nn.softmax(order, axis=-1) < top_p, axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(order, kept - 1, axis=-1)
    return jnp.where(logits_RxV >= threshold, logits_RxV, -jnp.inf)


def sample_tokens(logits_RxV: jax.Array, key: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Tokens [R] and their log-probs [R] over the full softmax (not renormalised for top-p, as servers report it)."""
    scaled = logits_RxV / sampling.temperature if sampling.temperature else logits_RxV
    if sampling.temperature == 0:
        tokens = jnp.argmax(scaled, axis=-1)
    else:
        allowed = nucleus(scaled, sampling.top_p) if sampling.top_p < 1 else scaled
        tokens = jax.random.categorical(key, allowed, axis=-1)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, axis=-1)


def begin(
    model: QwenVL, batch: PromptBatch, n: int, sampling: Sampling, banned: tuple[int, ...], pad: int
) -> tuple[_State, KeysValues]:
    """Prefill: the state of R = B x n rows before their first token, and the prompts' keys and values."""
    B, T = batch.tokens.shape[0], sampling.max_new_tokens
    R = B * n
    h, prompt = model.prefill(batch)
    first = ban(model.logits(model.last(h, batch)), banned)
    state = _State(
        step=jnp.zeros((), jnp.int32),
        logits=jnp.repeat(first, n, axis=0),
        cache=model.empty_cache(R, T),
        tokens=jnp.full((R, T), pad, jnp.int32),
        logprobs=jnp.zeros((R, T), jnp.float32),
        lengths=jnp.zeros(R, jnp.int32),
        done=jnp.zeros(R, bool),
    )
    return state, prompt


def advance(
    model: QwenVL,
    batch: PromptBatch,
    prompt: KeysValues,
    state: _State,
    until: jax.Array | int,
    key: jax.Array,
    sampling: Sampling,
    end_tokens: tuple[int, ...],
    banned: tuple[int, ...],
    pad: int,
) -> _State:
    """Decodes up to response token number `until` (not included), or to where every row has ended."""
    ends = jnp.array(end_tokens, jnp.int32)

    def body(state: _State) -> _State:
        tokens, logprobs = sample_tokens(state.logits, jax.random.fold_in(key, state.step), sampling)
        tokens = jnp.where(state.done, pad, tokens)
        h, cache = model.decode(tokens, state.step, state.cache, batch, prompt)
        return _State(
            step=state.step + 1,
            logits=ban(model.logits(h), banned),
            cache=cache,
            tokens=jax.lax.dynamic_update_slice(state.tokens, tokens[:, None], (0, state.step)),
            logprobs=jax.lax.dynamic_update_slice(
                state.logprobs, jnp.where(state.done, 0.0, logprobs)[:, None], (0, state.step)
            ),
            lengths=state.lengths + ~state.done,
            done=state.done | (tokens[:, None] == ends).any(-1),
        )

    return jax.lax.while_loop(lambda s: (s.step < until) & ~s.done.all(), body, state)


def generate(
    model: QwenVL,
    batch: PromptBatch,
    key: jax.Array,
    n: int,
    sampling: Sampling,
    end_tokens: tuple[int, ...],
    banned: tuple[int, ...],
    pad: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [B x n, T], log-probs [B x n, T] and lengths [B x n]; rows of a prompt follow one another."""
    state, prompt = begin(model, batch, n, sampling, banned, pad)
    final = advance(model, batch, prompt, state, sampling.max_new_tokens, key, sampling, end_tokens, banned, pad)
    return final.tokens, final.logprobs, final.lengths


class LocalEngine:
    """Synchronous: `generate` reads the parameters of the last `update_weights`, which the trainer must not donate
    before the next one.

    Args:
        model: gives the architecture and the first parameters.
        processor: gives end, banned and pad tokens.
        max_rows: responses decoded together; a batch holds max_rows // n prompts, and one for each device row at least.
        buckets: the declared shapes of a batch of prompts.
        mesh: the trainer's, on which the parameters lie; None: the default device. Of several processes each gives its
            own prompts and gets their samples; all of them call `generate` together, with equally many prompts.
    """

    def __init__(
        self,
        model: QwenVL,
        processor: Processor,
        *,
        max_rows: int,
        buckets: Buckets,
        mesh: Mesh | None = None,
    ):
        self._graph, self._parameters = nnx.split(model)
        self._mesh, self._shards = mesh, sharding.local_row_shards(mesh)
        self._processor, self._version, self._max_rows = processor, 0, max_rows
        self._buckets = buckets
        self._programs: dict[tuple[int, Sampling], Programs] = {}
        self._steps: dict[Sampling, tuple[Programs, Programs]] = {}

    def update_weights(self, parameters: nnx.State, version: int) -> None:
        """See engine.Engine; nothing is copied."""
        self._parameters, self._version = parameters, version

    def batch_prompts(self, n: int) -> int:
        """This process's prompts in a batch when each gets `n` responses."""
        return max(1, self._max_rows // n // sharding.row_shards(self._mesh)) * self._shards

    def program(self, n: int, sampling: Sampling) -> Programs:
        """What `generate` runs: (parameters, PromptBatch, seed) -> tokens, log-probs and lengths of n rows a prompt."""
        if (n, sampling) not in self._programs:
            known = self._processor

            def run(parameters, batch, seed):
                model = nnx.merge(self._graph, parameters)
                tokens = known.end_tokens, known.banned_tokens, known.pad_token
                return generate(model, batch, jax.random.key(seed), n, sampling, *tokens)

            out = {} if self._mesh is None else {"out_shardings": sharding.by_rows(self._mesh)}
            self._programs[n, sampling] = Programs(run, **out)
        return self._programs[n, sampling]

    def warm_up(self, sizes: Sequence[PromptSize], sampling: Sampling, n: int, images: bool | None = None) -> None:
        """See engine.Engine."""
        size, known = self.batch_prompts(n), self._processor
        images = any(prompt.images for prompt in sizes) if images is None else images
        for shape in self._buckets.shapes(sizes, images, size, self._shards):
            blank = self._buckets.blank(shape, known.config, known.pad_token)
            abstract = sharding.abstract(self._mesh, blank)
            self.program(n, sampling).compile(self._parameters, abstract, np.uint32(0))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int = 1,
        seed: int = 0,
        images: bool | None = None,
    ) -> list[list[Sample]]:
        """See engine.Engine."""
        groups: list[list[Sample]] = []
        size, known = self.batch_prompts(n), self._processor
        images = any(prompt.grids for prompt in prompts) if images is None else images
        calls = int(distributed.exchange(np.array([-(-len(prompts) // size)])).max())
        for number in range(calls):
            part = list(prompts[number * size : (number + 1) * size])
            shape = self._buckets.shape([PromptSize.of(prompt) for prompt in part], images, size, self._shards)
            shape = BatchShape(*distributed.exchange(np.array(shape)).max(0).tolist())
            batch = self._buckets.collate(part, known.config, known.pad_token, shards=self._shards, shape=shape)
            batch = sharding.put(self._mesh, batch)
            # One integer seeds a whole batch; each batch of the call draws its own stream.
            stream = np.uint32((seed + 7919 * number) % 2**32)
            drawn = self.program(n, sampling)(self._parameters, batch, stream)
            tokens, logprobs, lengths = map(sharding.fetch_rows, drawn)
            for row in range(len(part)):
                rows = range(row * n, (row + 1) * n)
                groups.append([self._sample(tokens[r, : lengths[r]], logprobs[r, : lengths[r]]) for r in rows])
        return groups

    def _step_programs(self, sampling: Sampling) -> tuple[Programs, Programs]:
        if sampling not in self._steps:
            known = self._processor
            banned, pad = known.banned_tokens, known.pad_token

            def first(parameters, batch):
                return begin(nnx.merge(self._graph, parameters), batch, 1, sampling, banned, pad)

            def further(state, parameters, batch, prompt, until, seed):
                model, key = nnx.merge(self._graph, parameters), jax.random.key(seed)
                return advance(model, batch, prompt, state, until, key, sampling, known.end_tokens, banned, pad)

            self._steps[sampling] = Programs(first), Programs(further, donate_argnums=0)  # the cache stays in place
        return self._steps[sampling]

    def stream(self, prompt: Prompt, sampling: Sampling, seed: int = 0) -> Iterator[tuple[int, float]]:
        """(token, log-prob) of one response, each as soon as it is decoded: what `generate` of this prompt gives."""
        known, drawn = self._processor, np.uint32(seed % 2**32)
        batch = jax.device_put(self._buckets.collate([prompt], known.config, known.pad_token))  # of a mesh: not here
        first, further = self._step_programs(sampling)
        state, keys_values = first(self._parameters, batch)
        for step in range(sampling.max_new_tokens):
            state = further(state, self._parameters, batch, keys_values, np.int32(step + 1), drawn)
            tokens, logprobs, done = jax.device_get((state.tokens, state.logprobs, state.done))
            yield int(tokens[0, step]), float(logprobs[0, step])
            if done[0]:
                return

    def _sample(self, tokens: np.ndarray, logprobs: np.ndarray) -> Sample:
        finish = "stop" if tokens[-1] in self._processor.end_tokens else "length"
        return Sample.whole(tokens, logprobs, finish, self._version)

    def close(self) -> None:
        """See engine.Engine."""
        self._parameters = None
