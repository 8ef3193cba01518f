"""One call of the local engine: what each of its responses has so far, and what the devices are told next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from capcur_jax.devices import distributed, sharding
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import Prompt
from capcur_jax.models.packed_rows import RowShape
from capcur_jax.models.paged import Pages
from capcur_jax.models.qwen_vl import PackedBatch
from capcur_jax.rollout.engine import Health, Sample, Sampling, Told
from capcur_jax.rollout.local import bursts
from capcur_jax.rollout.local.bursts import Burst, Copies, Rows
from capcur_jax.rollout.local.places import Admitted, Places

if TYPE_CHECKING:
    from capcur_jax.rollout.local.engine import LocalEngine


class Drawn(NamedTuple):
    """A response so far."""

    tokens: list[int]
    logprobs: list[float]


class Call:
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
            sizes, n, engine.shards, work.rows, work.prompts, engine.buckets.row, work.pool, sampling.max_new_tokens,
            engine.burst,
        )  # fmt: skip
        self._seed = np.uint32(seed % 2**32)
        # A response's number seeds it. Numbers run through the prompts of process 0, then of process 1, and so on.
        counts = distributed.exchange(np.array([len(prompts)])).reshape(-1)
        self._first = n * int(counts[: jax.process_index()].sum())
        self._drawn: dict[int, Drawn] = {}
        self._samples: dict[int, Sample] = {}
        self._started, self.steps = time.perf_counter(), 0  # turns of the loop so far
        self._pages: Pages = work.empty()

    def groups(self) -> list[list[Sample]]:
        """All samples, in the prompts' order."""
        return [self._group(prompt) for prompt in range(len(self._prompts))]

    def _group(self, prompt: int) -> list[Sample]:
        return [self._samples[prompt * self._n + i] for i in range(self._n)]

    def drawn(self, response: int) -> Drawn:
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
                        self._drawn[response] = Drawn([], [])
                        self._take(shard, one.slots[i], response, *drawn)

    def _read(self, admitted: Sequence[Sequence[Admitted]]) -> tuple[jax.Array, jax.Array]:
        engine, work, n = self._engine, self._work, self._n
        batch = self._collated([[self._prompts[one.prompt] for one in part] for part in admitted])
        count = work.copies(batch.tokens.shape[1], n)
        numbers = np.zeros((engine.shards, work.prompts, n), np.uint32)
        start = np.zeros((engine.shards, count), np.int32)
        # No two numbers of pages are the same, those that are past the last included.
        page = np.tile(work.pool.pages + np.arange(count, dtype=np.int32), (engine.shards, 1))
        for shard, part in enumerate(admitted):
            first = batch.places.prompt_start[shard]
            copies = [(first[i] + at, to) for i, one in enumerate(part) for at, to in one.copies]
            if copies:
                start[shard, : len(copies)], page[shard, : len(copies)] = np.array(copies).T
            for i, one in enumerate(part):
                numbers[shard, i, : len(one.responses)] = self._first + np.array(one.responses)
        arrays = batch, Copies(start.reshape(-1), page.reshape(-1)), numbers.reshape(-1, n)
        placed = sharding.put(engine.mesh, arrays)
        self._pages, drawn, logprobs = work.admit(engine.parameters, self._pages, *placed, self._seed)
        return drawn, logprobs

    def _collated(self, rows: Sequence[Sequence[Prompt]]) -> PackedBatch:
        """The prompts of each device row, in the shape that all processes need."""
        engine, known = self._engine, self._engine.processor
        shape = engine.buckets.shape([[PromptSize.of(prompt) for prompt in row] for row in rows], self._images)
        shape = RowShape(*distributed.exchange(np.array(shape)).max(0).tolist())
        return engine.buckets.collate(rows, shape, self._work.prompts, known.config, known.pad_token)

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
        rows = bursts.empty_rows(len(slots) * size, self._work.table)
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
