"""The embedded engine: JAX, in this process, reading the trainer's own parameters between updates.

Continuous batching (slots.py): a group's prompt is prefilled once and its responses decode in slots, which are given to
other prompts as they become free. Shapes come from declared buckets: the cache holds the longest declared prompt, so a
run compiles one program that decodes and one for each shape of prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from capcur_jax.devices import distributed, sharding
from capcur_jax.devices.programs import Programs
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.qwen_vl import PromptBatch, QwenVL
from capcur_jax.rollout.engine import Health, Sample, Sampling
from capcur_jax.rollout.local import slots as slots_lib
from capcur_jax.rollout.local.places import LOOK, Places
from capcur_jax.rollout.local.slots import Slots

_NEVER = np.iinfo(np.int32).max


class Work(NamedTuple):
    """The programs of a call, and its sizes."""

    empty: Programs  # () -> Slots
    admit: Programs  # (parameters, Slots, PromptBatch, slots [B, n], numbers [B, n]) -> Slots
    decode: Programs  # (parameters, Slots, seed, wanted [device rows], until) -> Slots
    rows: int  # slots of a device row
    prompts: int  # that one prefill takes, of a device row


class LocalEngine:
    """Synchronous: `generate` reads the parameters of the last `update_weights`, which the trainer must not donate
    before the next one.

    Args:
        model: gives the architecture, the mesh and the first parameters. Of several processes each gives its own
            prompts and gets their samples; all of them call `generate` together.
        processor: gives end, banned and pad tokens.
        slots: responses decoded together, split over the mesh's device rows; with the longest declared prompt and
            `Sampling.max_new_tokens` they make the cache's size.
        buckets: the declared shapes of a batch of prompts.
        prefill: prompts of a device row whose keys and values are computed at once; their responses start together.
        gathered: sample from a copy of the weights in the computation's type that device rows do not split. It costs
            its size on every device and spares gathering them anew for every token.
    """

    def __init__(
        self,
        model: QwenVL,
        processor: Processor,
        *,
        slots: int,
        buckets: Buckets,
        prefill: int = 1,
        gathered: bool = False,
    ):
        self._graph, parameters = nnx.split(model)
        self.mesh = mesh = model.mesh
        self.shards, self._all = sharding.local_row_shards(mesh), sharding.row_shards(mesh)
        self.processor, self.buckets, self._slots, self._prefill = processor, buckets, slots, prefill
        self._work: dict[tuple[int, Sampling], Work] = {}
        self._decode: dict[tuple[Sampling, int], tuple[Programs, Programs, dict]] = {}
        self._gather = _Gatherer(mesh, parameters, model.text.dtype) if gathered else None
        self._health, self.parameters = Health(version=0), parameters
        if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(parameters)):
            self.update_weights(parameters, 0)
        elif self._gather:  # by shape alone, for a plan
            self.parameters = self._gather.shape(parameters)

    # ------------------------------------------------------------------ the contract

    def update_weights(self, parameters: nnx.State, version: int) -> dict[str, float]:
        """See engine.Engine; nothing is copied unless the engine was made with `gathered`."""
        started, self.parameters = time.perf_counter(), parameters
        if self._gather:
            self.parameters = None  # the old copy goes before the new one comes
            self.parameters = jax.block_until_ready(self._gather(parameters))
        self._health = dataclasses.replace(self._health, version=version)
        return {"gather": time.perf_counter() - started} if self._gather else {}

    def warm_up(self, sizes: Sequence[PromptSize], sampling: Sampling, n: int, images: bool | None = None) -> None:
        """See engine.Engine."""
        work = self.work(n, sampling)
        images = any(prompt.images for prompt in sizes) if images is None else images
        work.empty.compile(self.parameters)
        slots = self.slots_shape(work)
        for shape in self.buckets.shapes(sizes, images, work.prompts * self.shards, self.shards):
            admitted, decoded = self.abstract(slots, shape, n)
            work.admit.compile(*admitted)
        work.decode.compile(*decoded)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int = 1,
        seed: int = 0,
        images: bool | None = None,
    ) -> list[list[Sample]]:
        """See engine.Engine. Raises InputError where too few patches are declared for the prompts, whichever of them
        would meet in a prefill."""
        shown = [PromptSize.of(prompt).images for prompt in prompts]
        self.buckets.images.possible(shown, self.work(n, sampling).prompts)
        call = _Call(self, sampling, prompts, n, seed, images)
        while distributed.agree(call.places.unfinished()):
            while distributed.agree(call.places.worthwhile()):
                call.admit()
            call.decode()
            self._health = call.collect()
        return call.groups()

    def stream(self, prompt: Prompt, sampling: Sampling, seed: int = 0) -> Iterator[tuple[int, float]]:
        """(token, log-prob) of one response, each as soon as it is decoded: what `generate` of this prompt gives."""
        call = _Call(self, sampling, [prompt], 1, seed, None)
        call.admit()
        (row,) = np.flatnonzero(call.places.running >= 0)
        for step in range(sampling.max_new_tokens):
            call.decode(until=step + 1)
            tokens, logprobs, done = map(sharding.fetch_rows, (call.slots.tokens, call.slots.logprobs, call.slots.done))
            yield int(tokens[row, step]), float(logprobs[row, step])
            if done[row]:
                return

    def health(self) -> Health:
        """See engine.Engine."""
        return self._health

    def counters(self) -> dict[str, int]:
        """None: a failure in this process ends the run."""
        return {}

    def release(self) -> None:
        """Does nothing: between calls the engine holds at most a gathered copy, which the trainer's plan counts."""

    def resume(self) -> None:
        """Does nothing, as `release`."""

    def close(self) -> None:
        """See engine.Engine."""
        self.parameters = None

    # ------------------------------------------------------------------ programs

    def work(self, n: int, sampling: Sampling) -> Work:
        """The programs of calls with `n` responses a prompt, compiled when they are first used."""
        if (n, sampling) not in self._work:
            known = self.processor
            rows = max(self._slots // self._all, n)
            empty, decode, placed = self._decoding(sampling, rows)

            def admit(parameters, slots, batch, places, numbers):
                model = nnx.merge(self._graph, parameters)
                return slots_lib.admit(model, slots, batch, places, numbers, known.banned_tokens)

            prompts = max(1, min(self._prefill, rows // n))
            self._work[n, sampling] = Work(empty, Programs(admit, donate_argnums=1, **placed), decode, rows, prompts)
        return self._work[n, sampling]

    def _decoding(self, sampling: Sampling, rows: int) -> tuple[Programs, Programs, dict]:
        """What does not depend on the number of responses a prompt, and where the slots lie."""
        if (sampling, rows) not in self._decode:
            known, prompt = self.processor, max(self.buckets.tokens)
            placed = {"out_shardings": jax.tree.map(functools.partial(NamedSharding, self.mesh), slots_lib.specs())}

            def empty(parameters):
                return slots_lib.empty(nnx.merge(self._graph, parameters), rows * self._all, prompt, sampling)

            def decode(parameters, slots, seed, wanted, until):
                model, key = nnx.merge(self._graph, parameters), jax.random.key(seed)
                tokens = known.end_tokens, known.banned_tokens
                return slots_lib.decode(model, slots, key, wanted, until, sampling, *tokens)

            programs = Programs(empty, **placed), Programs(decode, donate_argnums=1, **placed), placed
            self._decode[sampling, rows] = programs
        return self._decode[sampling, rows]

    def slots_shape(self, work: Work) -> Slots:
        """The slots of a call, by shape."""
        slots = work.empty.trace(self.parameters).out_info
        place = functools.partial(NamedSharding, self.mesh)
        at = lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(spec))  # noqa: E731
        return jax.tree.map(at, slots, slots_lib.specs())

    def abstract(self, slots: Slots, shape: BatchShape, n: int) -> tuple[tuple, tuple]:
        """Arguments of `Work.admit` and `Work.decode` for `slots_shape`'s slots, by shape."""
        blank = self.buckets.blank(shape, self.processor.config, self.processor.pad_token)
        numbers = np.zeros((shape.prompts, n), np.int32), np.zeros((shape.prompts, n), np.uint32)
        admitted = sharding.abstract(self.mesh, (blank, *numbers))
        limits = np.uint32(0), sharding.abstract(self.mesh, np.zeros(self.shards, np.int32)), np.int32(0)
        return (self.parameters, slots, *admitted), (self.parameters, slots, *limits)


class _Gatherer:
    """Copies matrices in `dtype`, split over `tensor` alone. The rest is small and keeps its type."""

    def __init__(self, mesh: Mesh, parameters: nnx.State, dtype: Any):
        flat = nnx.to_flat_state(parameters)
        self._dtypes = {path: dtype if path[-1] in ("kernel", "embedding") else leaf.dtype for path, leaf in flat}
        places = [(path, leaf.replace(sharding.unsplit(mesh, ".".join(path), leaf.shape))) for path, leaf in flat]
        self._places = nnx.from_flat_state(places)
        self._jitted = jax.jit(self._cast, out_shardings=self._places)

    def _cast(self, parameters: nnx.State) -> nnx.State:
        flat = nnx.to_flat_state(parameters)
        return nnx.from_flat_state([(path, leaf.replace(leaf[...].astype(self._dtypes[path]))) for path, leaf in flat])

    def __call__(self, parameters: nnx.State) -> nnx.State:
        return self._jitted(parameters)

    def shape(self, parameters: nnx.State) -> nnx.State:
        """The same by shape alone, for a plan."""
        shapes = jax.eval_shape(self._cast, parameters)
        at = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        return jax.tree.map(at, shapes, self._places)


class _Call:
    """One call of `generate`: which response is in which slot. All processes run the same programs together."""

    def __init__(
        self,
        engine: LocalEngine,
        sampling: Sampling,
        prompts: Sequence[Prompt],
        n: int,
        seed: int,
        images: bool | None,
    ):
        self._engine, self._work, self._prompts, self._n = engine, engine.work(n, sampling), prompts, n
        self._images = any(prompt.grids for prompt in prompts) if images is None else images
        rows, each = self._work.rows, self._work.prompts
        self.places = Places([PromptSize.of(prompt) for prompt in prompts], n, engine.shards, rows, each)
        self._seed = np.uint32(seed % 2**32)
        # A response's number seeds it. Numbers run through the prompts of process 0, then of process 1, and so on.
        counts = distributed.exchange(np.array([len(prompts)])).reshape(-1)
        self._first = n * int(counts[: jax.process_index()].sum())
        self._samples: dict[int, Sample] = {}
        self._started, self._tokens, self._clock = time.perf_counter(), 0, 0
        self.slots: Slots = self._work.empty(engine.parameters)

    def groups(self) -> list[list[Sample]]:
        """All samples, in the prompts' order."""
        return [[self._samples[prompt * self._n + i] for i in range(self._n)] for prompt in range(len(self._prompts))]

    def admit(self) -> None:
        """Prefills as many as there is room for."""
        engine, n, each = self._engine, self._n, self._work.prompts
        places = np.full((engine.shards, each, n), self._work.rows, np.int32)  # past the last: nobody
        numbers = np.zeros((engine.shards, each, n), np.uint32)
        admitted = self.places.admit()
        for shard, part in enumerate(admitted):
            for row, (prompt, slots) in enumerate(part):
                places[shard, row] = slots
                numbers[shard, row] = self._first + prompt * n + np.arange(n)
        parts = [[self._prompts[prompt] for prompt, _ in part] for part in admitted]
        arrays = self._collated(parts, each), places.reshape(-1, n), numbers.reshape(-1, n)
        self.slots = self._work.admit(engine.parameters, self.slots, *sharding.put(engine.mesh, arrays))

    def _collated(self, parts: Sequence[Sequence[Prompt]], each: int) -> PromptBatch:
        """The prompts of each device row, filled up with empty ones."""
        engine, known = self._engine, self._engine.processor
        flat = [prompt for part in parts for prompt in (*part, *[_nobody(known)] * (each - len(part)))]
        sizes = [PromptSize.of(prompt) for prompt in flat]
        shape = engine.buckets.shape(sizes, self._images, len(flat), engine.shards)
        shape = BatchShape(*distributed.exchange(np.array(shape)).max(0).tolist())
        return engine.buckets.collate(flat, known.config, known.pad_token, shards=engine.shards, shape=shape)

    def decode(self, until: int | None = None) -> None:
        """Steps until free slots are worth giving away, or the clock is `until`."""
        work, wanted = self._work, np.full(self._engine.shards, _NEVER, np.int32)
        if self.places.waiting:
            wanted[:] = self.places.wanted()
        limits = sharding.put(self._engine.mesh, wanted), np.int32(self._clock + LOOK if until is None else until)
        self.slots = work.decode(self._engine.parameters, self.slots, self._seed, *limits)

    def collect(self) -> Health:
        """Takes the responses that have ended out of their slots."""
        version, running = self._engine.health().version, self.places.running
        shape = running.shape
        slots, self._clock = self.slots, int(self.slots.clock)
        done, lengths = (sharding.fetch_rows(x).reshape(shape) for x in (slots.done, slots.lengths))
        ended = np.argwhere(done & (running >= 0))
        if len(ended):
            tokens, logprobs = (sharding.fetch_rows(x).reshape(*shape, -1) for x in (slots.tokens, slots.logprobs))
        for shard, row in ended:
            own = slice(lengths[shard, row])
            drawn = tokens[shard, row, own].copy(), logprobs[shard, row, own].copy()
            finish = "stop" if drawn[0][-1] in self._engine.processor.end_tokens else "length"
            self._samples[int(running[shard, row])] = Sample.whole(*drawn, finish, version)
            running[shard, row] = -1
            self._tokens += len(drawn[0])
        busy = running >= 0
        rate = (self._tokens + int(lengths[busy].sum())) / (time.perf_counter() - self._started)
        return Health(version, int(busy.sum()), self._n * len(self.places.waiting), rate)


def _nobody(processor: Processor) -> Prompt:
    """An empty prompt, which fills a batch up."""
    one = np.full(1, processor.pad_token, np.int32)
    empty = np.zeros((0, processor.config.vision.patch_bytes), np.uint8)
    return Prompt(one, np.zeros((3, 1), np.int32), 1, np.full(1, -1, np.int32), empty, ())
