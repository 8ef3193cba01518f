"""The embedded engine: JAX, in this process, reading the trainer's own parameters between updates.

Continuous batching (places.py): a group's prompt is read once and its responses decode in slots, which are given to
other prompts as they become free. Keys and values lie in pages; the devices decode in bursts (bursts.py), between which
the host admits and collects. Shapes come from declared buckets, so that a run compiles a program for each shape of
prompts and one for each number of rows that decode.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from capcur_jax.devices import distributed, sharding
from capcur_jax.devices.programs import Programs
from capcur_jax.models.batching import BatchShape, Buckets, PromptSize, rounded_up
from capcur_jax.models.decoding import DecodingModel
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.paged import Pages
from capcur_jax.models.qwen_vl import PromptBatch, QwenVL
from capcur_jax.rollout.engine import Health, Sample, Sampling, Told
from capcur_jax.rollout.local import bursts
from capcur_jax.rollout.local.bursts import BURST, Burst, Copies, Rows
from capcur_jax.rollout.local.places import Admitted, Places, Pool, burst_sizes

PAGE = 128  # tokens of a page on an accelerator


class Work(NamedTuple):
    """The programs of a call, and its sizes."""

    empty: Programs  # () -> Pages
    admit: Programs  # (parameters, Pages, PromptBatch, Copies, numbers [B, n], seed) -> Pages, tokens, log-probs
    decode: dict[bool, Programs]  # by `own`: (weights, Pages, Rows, seed, wanted, few, steps) -> Pages, Burst
    rows: int  # slots of a device row
    prompts: int  # that one prefill takes, of a device row
    pool: Pool
    table: int  # pages of a row at most

    @property
    def own(self) -> bool:
        """Whether a slot's page has its number."""
        return self.table == 1 and self.pool.pages == self.rows

    def copies(self, tokens: int, n: int) -> int:
        """Pages that a prefill of rows of so many tokens fills, of a device row."""
        return self.prompts * (tokens // self.pool.size + n)


class LocalEngine:
    """Synchronous: `generate` reads the parameters of the last `update_weights`, which the trainer must not donate
    before the next one, and a copy of the decoder for decoding (models/decoding.py).

    Args:
        model: gives the architecture, the mesh and the first parameters. Of several processes each gives its own
            prompts and gets their samples; all of them call `generate` together.
        processor: gives end, banned and pad tokens.
        slots: responses decoded together, split over the mesh's device rows.
        buckets: the declared shapes of a batch of prompts.
        prefill: prompts of a device row whose keys and values are computed at once.
        gathered: device rows do not split the copy for decoding. It costs its size on every device and spares gathering
            it anew for every token.
        page: tokens of a page of keys and values. 0: PAGE on an accelerator; on a CPU as many as a prompt and a
            response have at most, so that a response has one, which is always the slot's.
        pages: of a device row. 0: as many as all slots may need.
        burst: tokens of a response between two visits of the host, at most.
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
        page: int = 0,
        pages: int = 0,
        burst: int = BURST,
    ):
        self._graph, self.parameters = nnx.split(model)
        self.mesh = mesh = model.mesh
        self.shards, self._all = sharding.local_row_shards(mesh), sharding.row_shards(mesh)
        self.processor, self.buckets, self._slots, self._prefill = processor, buckets, slots, prefill
        small = mesh.devices.flat[0].platform == "cpu"
        self._page, self._pages, self.burst = page or (0 if small else PAGE), pages, burst
        self._work: dict[tuple[int, Sampling], Work] = {}
        self._decode: dict[tuple[Sampling, int], tuple[Programs, dict[bool, Programs], Pool, int]] = {}
        self.decoding = DecodingModel(model, gathered=gathered)
        self._health = Health(version=0)
        if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(self.parameters)):
            self.update_weights(self.parameters, 0)
        else:  # by shape alone, for a plan
            self.weights = self.decoding.abstract_weights(self.parameters)

    # ------------------------------------------------------------------ the contract

    def update_weights(self, parameters: nnx.State, version: int) -> dict[str, float]:
        """See engine.Engine."""
        started, self.parameters = time.perf_counter(), parameters
        self.weights = None  # the old copy goes before the new one comes
        self.weights = jax.block_until_ready(self.decoding.weights(parameters))
        self._health = dataclasses.replace(self._health, version=version)
        return {"copy": time.perf_counter() - started}

    def warm_up(self, sizes: Sequence[PromptSize], sampling: Sampling, n: int, images: bool | None = None) -> None:
        """See engine.Engine."""
        work = self.work(n, sampling)
        images = any(prompt.images for prompt in sizes) if images is None else images
        work.empty.compile()
        pages = self.pages_shape(work)
        for shape in self.buckets.shapes(sizes, images, work.prompts * self.shards, self.shards):
            work.admit.compile(*self.admitted(work, pages, shape, n))
        for rows in burst_sizes(work.rows):
            work.decode[work.own and rows == work.rows].compile(*self.decoded(work, pages, rows))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int = 1,
        seed: int = 0,
        images: bool | None = None,
        done: Told | None = None,
    ) -> list[list[Sample]]:
        """See engine.Engine. Raises InputError where too few patches are declared for the prompts, whichever of them
        would meet in a prefill, or too few pages for one of them and its response."""
        shown = [PromptSize.of(prompt).images for prompt in prompts]
        self.buckets.images.possible(shown, self.work(n, sampling).prompts)
        call = _Call(self, sampling, prompts, n, seed, images, done)
        while distributed.agree(call.places.unfinished()):
            call.admit()
            call.decode()
            self._health = call.health()
        return call.groups()

    def stream(self, prompt: Prompt, sampling: Sampling, seed: int = 0) -> Iterator[tuple[int, float]]:
        """(token, log-prob) of one response, each as soon as it is decoded: what `generate` of this prompt gives."""
        call = _Call(self, sampling, [prompt], 1, seed, None)
        call.admit()
        told = 0
        while True:
            tokens, logprobs = call.drawn(0)
            yield from zip(tokens[told:], logprobs[told:], strict=True)
            told = len(tokens)
            if not call.places.unfinished():
                return
            call.decode(steps=1)

    def health(self) -> Health:
        """See engine.Engine."""
        return self._health

    def counters(self) -> dict[str, int]:
        """None: a failure in this process ends the run."""
        return {}

    def release(self) -> None:
        """Does nothing: between calls the engine holds the copy for decoding, which the trainer's plan counts."""

    def resume(self) -> None:
        """Does nothing, as `release`."""

    def close(self) -> None:
        """See engine.Engine."""
        self.parameters = self.weights = None

    # ------------------------------------------------------------------ programs

    def work(self, n: int, sampling: Sampling) -> Work:
        """The programs of calls with `n` responses a prompt, compiled when they are first used."""
        if (n, sampling) not in self._work:
            known, rows = self.processor, max(self._slots // self._all, n)
            empty, decode, pool, table = self._decoding(sampling, rows)

            def admit(parameters, pages, batch, copies, numbers, seed):
                model, key = nnx.merge(self._graph, parameters), jax.random.key(seed)
                return bursts.admit(model, pages, batch, copies, numbers, key, sampling, known.banned_tokens)

            prompts, by_rows = max(1, min(self._prefill, rows // n)), sharding.by_rows(self.mesh)
            places = self.decoding.pages_places(), by_rows, by_rows
            programs = Programs(admit, donate_argnums=1, out_shardings=places)
            self._work[n, sampling] = Work(empty, programs, decode, rows, prompts, pool, table)
        return self._work[n, sampling]

    def _decoding(self, sampling: Sampling, rows: int) -> tuple[Programs, dict[bool, Programs], Pool, int]:
        """What does not depend on the number of responses a prompt."""
        if (sampling, rows) not in self._decode:
            known, by_rows, places = self.processor, sharding.by_rows(self.mesh), self.decoding.pages_places()
            longest = max(self.buckets.tokens) + sampling.max_new_tokens
            size = self._page or rounded_up(longest, 8)
            table = Pool(0, size).of(longest)
            pool = Pool(self._pages or rows * table, size)

            def empty():
                return self.decoding.empty_pages(pool.pages * self._all, size)

            def decode(own, weights, pages, rows, seed, *limits):
                tokens, key = (known.end_tokens, known.banned_tokens), jax.random.key(seed)
                return bursts.decode(
                    self.decoding, weights, pages, rows, key, *limits, sampling, *tokens, own=own,
                    longest=min(self.burst, sampling.max_new_tokens),
                )  # fmt: skip

            kinds = dict(
                donate_argnums=1, out_shardings=(places, Burst(by_rows, by_rows, by_rows)),
                compiler_options=bursts.options(self.mesh.devices.flat[0].platform),
            )  # fmt: skip
            decoding = {own: Programs(functools.partial(decode, own), **kinds) for own in (False, True)}
            self._decode[sampling, rows] = Programs(empty, out_shardings=places), decoding, pool, table
        return self._decode[sampling, rows]

    def pages_shape(self, work: Work) -> Pages:
        """The pages of a call, by shape."""
        at = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
        return jax.tree.map(at, work.empty.trace().out_info, self.decoding.pages_places())

    def admitted(self, work: Work, pages: Pages, shape: BatchShape, n: int) -> tuple:
        """Arguments of `Work.admit` by shape."""
        blank = self.buckets.blank(shape, self.processor.config, self.processor.pad_token)
        copies = np.zeros(self.shards * work.copies(shape.tokens, n), np.int32)
        arrays = blank, Copies(copies, copies), np.zeros((shape.prompts, n), np.uint32)
        return (self.parameters, pages, *sharding.abstract(self.mesh, arrays), np.uint32(0))

    def decoded(self, work: Work, pages: Pages, rows: int) -> tuple:
        """Arguments of `Work.decode` by shape, for bursts of so many rows of a device row."""
        arrays = _rows(self.shards * rows, work.table), np.zeros(self.shards, np.int32)
        mine, wanted = sharding.abstract(self.mesh, arrays)
        return self.weights, pages, mine, np.uint32(0), wanted, np.int32(0), np.int32(0)


def _rows(count: int, table: int) -> Rows:
    """Rows with nobody in them (numpy)."""
    zeros = [np.zeros(count, np.int32) for _ in range(5)]
    return Rows(*zeros, np.zeros(count, np.uint32), np.zeros((count, table), np.int32))


class _Drawn(NamedTuple):
    """A response so far."""

    tokens: list[int]
    logprobs: list[float]


class _Call:
    """One call of `generate`: what each response has so far. All processes run the same programs together."""

    def __init__(
        self,
        engine: LocalEngine,
        sampling: Sampling,
        prompts: Sequence[Prompt],
        n: int,
        seed: int,
        images: bool | None,
        done: Told | None = None,
    ):
        self._engine, self._work, self._prompts, self._n = engine, engine.work(n, sampling), prompts, n
        self._images = any(prompt.grids for prompt in prompts) if images is None else images
        self._sampling, self._done, work = sampling, done, self._work
        sizes = [PromptSize.of(prompt) for prompt in prompts]
        self.places = Places(
            sizes, n, engine.shards, work.rows, work.prompts, work.pool, sampling.max_new_tokens, engine.burst
        )  # fmt: skip
        self._seed = np.uint32(seed % 2**32)
        # A response's number seeds it. Numbers run through the prompts of process 0, then of process 1, and so on.
        counts = distributed.exchange(np.array([len(prompts)])).reshape(-1)
        self._first = n * int(counts[: jax.process_index()].sum())
        self._drawn: dict[int, _Drawn] = {}
        self._samples: dict[int, Sample] = {}
        self._started, self.steps = time.perf_counter(), 0  # turns of the loop so far
        self._pages: Pages = work.empty()

    def groups(self) -> list[list[Sample]]:
        """All samples, in the prompts' order."""
        return [self._group(prompt) for prompt in range(len(self._prompts))]

    def _group(self, prompt: int) -> list[Sample]:
        return [self._samples[prompt * self._n + i] for i in range(self._n)]

    def drawn(self, response: int) -> _Drawn:
        """Its tokens so far, and their log-probs."""
        return self._drawn[response]

    def health(self) -> Health:
        """What goes on now."""
        busy, waiting = int((self.places.running >= 0).sum()), sum(len(e.responses) for e in self.places.waiting)
        rate = sum(len(drawn.tokens) for drawn in self._drawn.values()) / (time.perf_counter() - self._started)
        return Health(self._engine.health().version, busy, waiting, rate)

    # ------------------------------------------------------------------ prompts

    def admit(self) -> None:
        """Reads prompts while there is room for many, and draws the first tokens of their responses."""
        begun = []
        while distributed.agree(self.places.worthwhile()):
            admitted = self.places.admit()
            begun.append((admitted, *self._read(admitted)))
        for admitted, tokens, logprobs in begun:  # the devices read all prompts before the host waits for the first
            of_rows = [sharding.fetch_rows(x).reshape(len(admitted), -1, self._n) for x in (tokens, logprobs)]
            for shard, part in enumerate(admitted):
                for row, one in enumerate(part):
                    for i, response in enumerate(one.responses):
                        drawn = [x[shard, row, i : i + 1] for x in of_rows]
                        self._drawn[response] = _Drawn([], [])
                        self._take(shard, one.slots[i], response, *drawn)

    def _read(self, admitted: Sequence[Sequence[Admitted]]) -> tuple[jax.Array, jax.Array]:
        engine, work, n, each = self._engine, self._work, self._n, self._work.prompts
        batch = self._collated([[self._prompts[one.prompt] for one in part] for part in admitted], each)
        tokens = batch.tokens.shape[1]
        count = work.copies(tokens, n)
        numbers = np.zeros((engine.shards, each, n), np.uint32)
        start = np.zeros((engine.shards, count), np.int32)
        # No two numbers of pages are the same, those that are past the last included.
        page = np.tile(work.pool.pages + np.arange(count, dtype=np.int32), (engine.shards, 1))
        for shard, part in enumerate(admitted):
            copies = [(row * tokens + at, to) for row, one in enumerate(part) for at, to in one.copies]
            if copies:
                start[shard, : len(copies)], page[shard, : len(copies)] = np.array(copies).T
            for row, one in enumerate(part):
                numbers[shard, row, : len(one.responses)] = self._first + np.array(one.responses)
        arrays = batch, Copies(start.reshape(-1), page.reshape(-1)), numbers.reshape(-1, n)
        placed = sharding.put(engine.mesh, arrays)
        self._pages, drawn, logprobs = work.admit(engine.parameters, self._pages, *placed, self._seed)
        return drawn, logprobs

    def _collated(self, parts: Sequence[Sequence[Prompt]], each: int) -> PromptBatch:
        """The prompts of each device row, filled up with empty ones."""
        engine, known = self._engine, self._engine.processor
        flat = [prompt for part in parts for prompt in (*part, *[_nobody(known)] * (each - len(part)))]
        sizes = [PromptSize.of(prompt) for prompt in flat]
        shape = engine.buckets.shape(sizes, self._images, len(flat), engine.shards)
        shape = BatchShape(*distributed.exchange(np.array(shape)).max(0).tolist())
        return engine.buckets.collate(flat, known.config, known.pad_token, shards=engine.shards, shape=shape)

    # ------------------------------------------------------------------ responses

    def decode(self, steps: int | None = None) -> None:
        """A burst of so many tokens of every response, less where free slots are worth giving away before."""
        engine, work, places = self._engine, self._work, self.places
        for response in places.reserve():
            del self._drawn[response]
        live = [np.flatnonzero(row >= 0).tolist() for row in places.running]
        if not (most := distributed.exchange(np.array([max(map(len, live))])).max()):
            return
        size, few, wanted = places.burst(int(most), distributed.agree(bool(places.waiting)))
        own = work.own and size == work.rows
        slots = [list(range(size)) if own else mine for mine in live]
        mine, limits = sharding.put(engine.mesh, (self._rows(slots, size), wanted.astype(np.int32)))
        given = engine.weights, self._pages, mine, self._seed, limits, np.int32(few), np.int32(steps or engine.burst)
        burst: Burst
        self._pages, burst = work.decode[own](*given)
        tokens, logprobs, made = (sharding.fetch_rows(x).reshape(engine.shards, size, -1) for x in burst)
        self.steps += int(made.max())
        for shard, mine in enumerate(slots):
            for row, slot in enumerate(mine):
                if (response := int(places.running[shard, slot])) >= 0:
                    here = (shard, row, slice(int(made[shard, row, 0])))
                    places.drew(shard, slot, here[2].stop)
                    self._take(shard, slot, response, tokens[here], logprobs[here])

    def _rows(self, slots: Sequence[Sequence[int]], size: int) -> Rows:
        """Of each device row those slots, and nobody behind them."""
        rows = _rows(len(slots) * size, self._work.table)
        for shard, mine in enumerate(slots):
            for row, slot in enumerate(mine, shard * size):
                if (response := int(self.places.running[shard, slot])) < 0:
                    continue
                prompt, drawn, pages = response // self._n, self._drawn[response], self.places.pages(shard, slot)
                count, given = len(drawn.tokens), self._prompts[prompt]
                rows.tokens[row], rows.drawn[row] = drawn.tokens[-1], count
                rows.positions[row], rows.at[row] = given.next_position + count - 1, len(given) + count - 1
                rows.left[row], rows.numbers[row] = self._sampling.max_new_tokens - count, self._first + response
                rows.pages[row, : len(pages)] = pages
        return rows

    def _take(self, shard: int, slot: int, response: int, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """More tokens of a response; where it has ended its slot is free, and `done` is told if its group is whole."""
        drawn, ends = self._drawn[response], self._engine.processor.end_tokens
        drawn.tokens.extend(tokens.tolist())
        drawn.logprobs.extend(logprobs.tolist())
        stopped = drawn.tokens[-1] in ends
        if not stopped and len(drawn.tokens) < self._sampling.max_new_tokens:
            return
        arrays = np.array(drawn.tokens, np.int32), np.array(drawn.logprobs, np.float32)
        version = self._engine.health().version
        self._samples[response] = Sample.whole(*arrays, "stop" if stopped else "length", version)
        self.places.release(shard, slot)
        prompt = response // self._n
        whole = all(prompt * self._n + i in self._samples for i in range(self._n))
        if self._done and whole:
            self._done(prompt, self._group(prompt))


def _nobody(processor: Processor) -> Prompt:
    """An empty prompt, which fills a batch up."""
    one = np.full(1, processor.pad_token, np.int32)
    empty = np.zeros((0, processor.config.vision.patch_bytes), np.uint8)
    return Prompt(one, np.zeros((3, 1), np.int32), 1, np.full(1, -1, np.int32), empty, ())
