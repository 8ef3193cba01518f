"""Prompts over several SGLang servers: which server gets one, and what becomes of it when that fails.

A prompt is one request with `n` samples: the server then prepares and prefills it, images included, once for its group.
What a failed try brought whole is kept, and the next one asks for the rest alone, of another server where there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from capcur_jax.errors import RolloutError
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.rollout.engine import Sample, Sampling, Told
from capcur_jax.rollout.sglang import wire
from capcur_jax.rollout.sglang.client import Refused, ServerError, TimedOut, Unreachable
from capcur_jax.rollout.sglang.fleet import Fleet, cancel
from capcur_jax.rollout.sglang.member import Server
from capcur_jax.rollout.sglang.settings import WHERE
from capcur_jax.rollout.sglang.sync import WeightSync

# Prompts tried again, servers started again; requests without an answer in time, without a connection to the end, with
# an error or an answer that can't be used; responses that servers gave up; prompts that all servers refused.
COUNTERS = ("retries", "restarts", "timeouts", "unreachable", "refused", "aborted", "refused_prompts")


@dataclasses.dataclass
class Progress:
    """Of the call that runs or ran last; other threads read it."""

    running: int = 0  # responses
    queued: int = 0
    tokens: int = 0
    started: float = 0.0
    ended: float = 0.0
    refusal: str = ""  # of the last prompt that all servers refused, in this call or before

    @property
    def tokens_per_second(self) -> float:
        seconds = (self.ended or time.monotonic()) - self.started
        return self.tokens / seconds if self.started and seconds > 0 else 0.0


class Pool:
    """Asks the servers of a fleet. In the fleet's event loop."""

    def __init__(self, fleet: Fleet, sync: WeightSync, processor: Processor):
        self.fleet, self.sync, self.progress = fleet, sync, Progress()
        self._processor, self._settings, self._counters = processor, fleet.settings, fleet.counters
        self._dark_since: float | None = None  # no server has been up since then

    async def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, n: int, seed: int, done: Told | None = None
    ) -> list[list[Sample]]:
        """n samples of each prompt, in their order; none of one that every server refuses. Raises RolloutError.

        `done`: see engine.Engine.
        """
        if self.sync.version is None:
            raise RolloutError("the SGLang servers have no weights yet: update_weights comes before generate")
        # The last refusal stays known: who asks for the reason has had others drawn meanwhile.
        refusal, started = self.progress.refusal, time.monotonic()
        self.progress = progress = Progress(queued=n * len(prompts), started=started, refusal=refusal)

        async def group(number: int, prompt: Prompt) -> list[Sample]:
            found = await self._group(prompt, sampling, n, seed + 7919 * number, progress)
            if found and done:
                done(number, found)
            return found

        tasks = [asyncio.create_task(group(number, prompt)) for number, prompt in enumerate(prompts)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            await cancel(tasks)
            progress.ended, progress.running, progress.queued = time.monotonic(), 0, 0

    async def _group(self, prompt: Prompt, sampling: Sampling, n: int, seed: int, progress: Progress) -> list[Sample]:
        found: list[Sample] = []
        avoid: Server | None = None
        pictures: list[str] | None = None
        for attempt in range(self._settings.retries + 1):
            self._counters["retries"] += attempt > 0
            disliked = False
            missing = n - len(found)
            async with self._place(avoid) as server:
                progress.queued -= missing
                progress.running += missing
                try:
                    if pictures is None:
                        pictures = await asyncio.to_thread(self._pictures, prompt)
                    got = await self._ask(server, prompt, sampling, missing, pictures, seed + 104729 * attempt)
                    found += got
                    progress.tokens += sum(len(sample.tokens) for sample in got)
                    reason = "the server gave up some of its responses"
                except ServerError as error:
                    reason = str(error)
                    self._failed(server, error)
                    disliked = isinstance(error, Refused) and error.of_request
                except wire.BadAnswer as error:
                    reason = str(error)
                    self._counters["refused"] += 1
                    if isinstance(error, wire.ForeignWeights):
                        self.fleet.down(server, reason)
                finally:
                    progress.running -= missing
                    progress.queued += n - len(found)
            if len(found) == n:
                return found
            avoid = server
        if disliked:  # to the last try: what is wrong is the prompt
            self._counters["refused_prompts"] += 1
            progress.refusal = f"{avoid}: {reason}"
            progress.queued -= n - len(found)
            return []
        raise RolloutError(
            f"{self._settings.retries + 1} tries ({WHERE}.retries) brought {len(found)} of {n} responses to a prompt "
            f"of {len(prompt)} tokens with {len(prompt.grids)} images; the last: {avoid}: {reason}"
        )

    def _pictures(self, prompt: Prompt) -> list[str]:
        return [wire.png(image) for image in wire.images(prompt, self._processor)]

    async def _ask(
        self, server: Server, prompt: Prompt, sampling: Sampling, n: int, pictures: Sequence[str], seed: int
    ) -> list[Sample]:
        """n samples or fewer. Raises ServerError, WrongPrompt or BadAnswer."""
        held = self.sync.held(server)
        seeds = [(seed + 15485863 * number) % 2**31 for number in range(n)] if self._settings.deterministic else ()
        rid = uuid.uuid4().hex
        body = wire.payload(prompt, self._processor, sampling, n, rid, pictures, seeds)
        call = asyncio.ensure_future(server.client.generate(body, self._settings.request_timeout_s))
        server.calls.add(call)
        try:
            answer = await call
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling() or not call.cancelled():
                raise  # this call itself is being ended
            raise Unreachable(server.reason or "it went down") from None
        finally:
            server.calls.discard(call)
            if call.cancelled() or not call.done() or isinstance(call.exception(), TimedOut):
                # The closed connection aborts what runs. This is for what waits in the server's queue under the name
                # that we gave it; groups get names of the server's own.
                self.fleet.begin(self._abort(server, body["rid"]))
        got = wire.samples(answer, prompt, self._processor, sampling, n)
        if behind := [sample.spans[-1].version for sample in got if sample.spans[-1].version < held]:
            raise wire.ForeignWeights(f"made by weights of version {behind[0]}, it should have {held}")
        server.failures = 0
        self._counters["aborted"] += n - len(got)
        return got

    async def _abort(self, server: Server, rid: str | list[str]) -> None:
        for one in [rid] if isinstance(rid, str) else rid:
            with contextlib.suppress(ServerError):
                await server.client.abort(one)

    def _failed(self, server: Server, error: ServerError) -> None:
        self._counters[{TimedOut: "timeouts", Unreachable: "unreachable"}.get(type(error), "refused")] += 1
        if not isinstance(error, Refused) or error.status >= 500:  # else it is well enough to say what it dislikes
            self.fleet.doubt(server)

    # ------------------------------------------------------------------ places

    @contextlib.asynccontextmanager
    async def _place(self, avoid: Server | None) -> AsyncIterator[Server]:
        server = await self._free_place(avoid)
        server.busy += 1
        try:
            yield server
        finally:
            server.busy -= 1
            await self.fleet.notify()

    async def _free_place(self, avoid: Server | None) -> Server:
        """The least loaded server with room; not `avoid` while another one is up. Raises RolloutError: none comes."""
        fleet = self.fleet
        async with fleet.changed:
            while True:
                up = fleet.up
                if up:
                    self._dark_since = None
                others = [server for server in up if server is not avoid]
                room = [server for server in others or up if server.busy < server.limit and not server.doubted]
                if room:
                    least = min(server.busy for server in room)
                    return random.choice([server for server in room if server.busy == least])
                if up:
                    await fleet.changed.wait()
                    continue
                self._dark_since = self._dark_since or time.monotonic()
                left = self._dark_since + fleet.patience_s - time.monotonic()
                if fleet.lost or left <= 0:
                    raise RolloutError(fleet.dead())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(fleet.changed.wait(), left)
