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
from capcur_jax.errors import InputError
from capcur_jax.models.batching import Buckets, PromptSize, rounded_up
from capcur_jax.models.decoding import DecodingModel
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.packed_rows import RowShape
from capcur_jax.models.paged import Pages
from capcur_jax.models.qwen_vl import QwenVL
from capcur_jax.rollout.engine import Health, Sample, Sampling, Told
from capcur_jax.rollout.local import bursts
from capcur_jax.rollout.local.bursts import BURST, Burst, Copies
from capcur_jax.rollout.local.call import Call
from capcur_jax.rollout.local.places import Pool, burst_sizes

PAGE = 128  # tokens of a page on an accelerator


class Work(NamedTuple):
    """The programs of a call, and its sizes."""

    empty: Programs  # () -> Pages
    admit: Programs  # (parameters, Pages, PackedBatch, Copies, numbers [B, n], seed) -> Pages, tokens, log-probs
    decode: dict[bool, Programs]  # by `own`: (weights, Pages, Rows, seed, wanted, few, steps) -> Pages, Burst
    rows: int  # slots of a device row
    prompts: int  # that one prefill takes of a device row, at most
    pool: Pool
    table: int  # pages of a row at most

    @property
    def own(self) -> bool:
        """Whether a slot's page has its number."""
        return self.table == 1 and self.pool.pages == self.rows

    def copies(self, tokens: int, n: int) -> int:
        """Pages that a prefill of a row of so many tokens fills, at most: what of a prompt fills no page goes to each
        response's own."""
        return tokens // self.pool.size + self.prompts * n


class LocalEngine:
    """Synchronous: `generate` reads the parameters of the last `update_weights`, which the trainer must not donate
    before the next one, and a copy of the decoder for decoding (models/decoding.py).

    Args:
        model: gives the architecture, the mesh and the first parameters. Of several processes each gives its own
            prompts and gets their samples; all of them call `generate` together.
        processor: gives end, banned and pad tokens.
        slots: responses decoded together, split over the mesh's device rows.
        buckets: the declared shapes of a batch of prompts.
        prefill: prompts of a device row whose keys and values are computed at once, at most: as many as the longest
            of `buckets` holds.
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
        platform = mesh.devices.flat[0].platform
        odd = {"gpu": page & (page - 1) or page > 2 * PAGE, "tpu": page % 16}
        if odd.get(platform):
            raise InputError(
                f"config.rollout.page = {page}: the kernels of a {platform.upper()} want "
                + (f"a power of two, at most {2 * PAGE}" if platform == "gpu" else "a multiple of 16")
            )
        self._page, self._pages, self.burst = page or (0 if platform == "cpu" else PAGE), pages, burst
        self._work: dict[tuple[int, Sampling], Work] = {}
        self._decode: dict[tuple[Sampling, int], tuple[Programs, dict[bool, Programs], Pool, int]] = {}
        self.decoding = DecodingModel(model, gathered=gathered)
        self._health, self._evicted = Health(version=0), 0
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
        for shape in self.buckets.shapes(sizes, images, work.prompts):
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
        if sizes := [PromptSize.of(prompt) for prompt in prompts]:
            self.buckets.possible(sizes, self.work(n, sampling).prompts)
        call = Call(self, sampling, prompts, n, seed, images, done)
        while distributed.agree(call.places.unfinished()):
            call.admit()
            call.decode()
            self._health = call.health()
        self._evicted += call.places.evicted
        return call.groups()

    def stream(self, prompt: Prompt, sampling: Sampling, seed: int = 0) -> Iterator[tuple[int, float]]:
        """(token, log-prob) of one response, each as soon as it is decoded: what `generate` of this prompt gives."""
        call = Call(self, sampling, [prompt], 1, seed, None)
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
        """Responses that gave their pages back and were drawn again. No failures: one in this process ends the run."""
        return {"evicted": self._evicted}

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
            longest = (self.buckets.longest or self.buckets.row) + sampling.max_new_tokens
            size = self._page or rounded_up(longest, 8)
            table = Pool(0, size).of(longest)
            pool = Pool(self._pages or rows * table, size)
            pool.row(longest)  # refuses too few

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

    def admitted(self, work: Work, pages: Pages, shape: RowShape, n: int) -> tuple:
        """Arguments of `Work.admit` by shape."""
        known = self.processor
        blank = self.buckets.blank(self.shards, shape, work.prompts, known.config, known.pad_token)
        copies = np.zeros(self.shards * work.copies(shape.length, n), np.int32)
        arrays = blank, Copies(copies, copies), np.zeros((self.shards * work.prompts, n), np.uint32)
        return (self.parameters, pages, *sharding.abstract(self.mesh, arrays), np.uint32(0))

    def decoded(self, work: Work, pages: Pages, rows: int) -> tuple:
        """Arguments of `Work.decode` by shape, for bursts of so many rows of a device row."""
        arrays = bursts.empty_rows(self.shards * rows, work.table), np.zeros(self.shards, np.int32)
        mine, wanted = sharding.abstract(self.mesh, arrays)
        return self.weights, pages, mine, np.uint32(0), wanted, np.int32(0), np.int32(0)
