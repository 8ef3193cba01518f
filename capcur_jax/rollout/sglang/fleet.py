"""The servers of an SGLang engine: their start, what becomes of one that fails, their memory, and their end.

Everything here runs in one event loop. A server takes prompts while `up`. One that isn't is on its way back: restarted
if it is ours, waited for if it is someone else's. It is up again when it has what `start` was told to give it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.rollout.sglang.client import ServerError, TimedOut, Unreachable
from capcur_jax.rollout.sglang.member import Server
from capcur_jax.rollout.sglang.settings import WHERE, Settings

WATCH_S = 0.5  # between looks at the processes
PROBE_S = 2.0  # between questions to a server that isn't there
Answer = TypeVar("Answer")


class Fleet:
    """`servers`, kept running. `counters` has the restarts, and what else went wrong in asking them."""

    def __init__(self, settings: Settings, servers: Sequence[Server]):
        self.settings, self.servers = settings, list(servers)
        self.counters: Counter[str] = Counter()
        self.changed = asyncio.Condition()  # a place became free, or a server came or went
        # Held while servers are paused, which makes them look dead: nobody asks for their health meanwhile.
        self.undisturbed = asyncio.Lock()
        self._admit: Callable[[Server], Awaitable[None]] | None = None
        self._tasks: set[asyncio.Task] = set()
        self._recovering: set[Server] = set()
        self._asleep = False

    @property
    def up(self) -> list[Server]:
        """Where prompts go."""
        return [server for server in self.servers if server.up]

    @property
    def lost(self) -> bool:
        """Whether no server will come back."""
        return all(server.lost for server in self.servers)

    @property
    def patience_s(self) -> float:
        """Seconds without any server after which none is expected."""
        ours = any(server.process for server in self.servers)
        return self.settings.start_timeout_s * (1 + self.settings.restarts * ours)

    def dead(self) -> str:
        """Why no server is left, for a message."""
        told = "\n".join(server.told() for server in self.servers if not server.up)
        return f"no SGLang server is left ({WHERE}.restarts = {self.settings.restarts} in a row)\n{told}"

    # ------------------------------------------------------------------ start and end

    async def start(self, admit: Callable[[Server], Awaitable[None]]) -> None:
        """Starts what is ours and waits for all. Raises InputError with the log's end for one that doesn't come.

        Args:
            admit: gives a healthy server that comes back what it must have before it is asked; `undisturbed` is held.
                Raises ServerError or RolloutError.
        """
        self._admit = admit
        for server in self.servers:
            if server.process:
                server.process.start()
        waits = [asyncio.create_task(self._started(server)) for server in self.servers]
        try:
            await asyncio.gather(*waits)
        except ServerError as error:
            culprit = next(server for server in self.servers if server.reason)
            raise InputError(f"an SGLang server didn't start: {error}\n{culprit.told()}") from None
        finally:
            await cancel(waits)
        for server in self.servers:
            await self._must_obey(server)
            server.up = True
        self.begin(self._watch())

    async def close(self) -> None:
        await cancel(self._tasks)
        stops = [asyncio.to_thread(server.process.stop) for server in self.servers if server.process]
        await asyncio.gather(*stops, *(server.client.close() for server in self.servers))

    def begin(self, work: Awaitable) -> None:
        """Runs it beside everything else, until `close`."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _started(self, server: Server) -> None:
        """As `_healthy`; a process that ends is started once more: a busy host, or a port that was taken meanwhile."""
        try:
            await self._healthy(server)
        except Unreachable:
            if server.process is None:
                raise
            await asyncio.to_thread(server.process.stop)
            server.process.start()
            await self._healthy(server)

    async def _healthy(self, server: Server) -> None:
        """Returns when it is. Raises ServerError when its process ends or start_timeout_s is over."""
        give_up = time.monotonic() + self.settings.start_timeout_s
        while not await server.client.healthy():
            code = server.process.ended() if server.process else None
            if code is not None:
                server.reason = f"it ended with code {code} while it started"
                raise Unreachable(server.reason)
            if time.monotonic() > give_up:
                server.reason = f"not healthy after {WHERE}.start_timeout_s = {self.settings.start_timeout_s:g}"
                raise TimedOut(server.reason)
            await asyncio.sleep(PROBE_S / 4)
        if server.process:
            await asyncio.to_thread(server.process.note)

    async def _must_obey(self, server: Server) -> None:
        try:
            obeys = await server.client.obeys()
        except (ServerError, KeyError, TypeError) as error:
            raise InputError(f"{server} is up and doesn't answer as SGLang 0.5.23 does: {error!r}") from None
        if not obeys:
            raise InputError(
                f"{server} ignores logit_bias, by which tokens are banned: its samples could not be trained on. "
                f"sglang-router 0.3.2 drops it; name servers, not a router, in {WHERE}.addresses: prompts are spread "
                "over them without one"
            )

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    # ------------------------------------------------------------------ servers that fail

    def doubt(self, server: Server) -> None:
        """Checks the health of a server on which a request failed; until then it gets no other, to fail as fast."""
        if server.up and not server.doubted:
            server.doubted = True
            self.begin(self._look(server))

    async def _look(self, server: Server) -> None:
        try:
            if server.process is None or server.process.ended() is None:
                async with self.undisturbed:
                    if not server.up or self._asleep or await server.client.healthy():
                        return
            self.down(server, "it doesn't answer")
        finally:
            server.doubted = False
            await self.notify()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for server in self.servers:
                if server.up and server.process and (code := server.process.ended()) is not None:
                    self.down(server, f"its process ended with code {code}")

    def down(self, server: Server, reason: str) -> None:
        """Takes a server out and has it back; its prompts go elsewhere at once."""
        if server in self._recovering or server.lost:
            return
        server.reason, server.checksums, server.version = reason, None, None
        server.leave()
        self._recovering.add(server)
        self.begin(self._recover(server))

    async def _recover(self, server: Server) -> None:
        try:
            await self.notify()
            await (self._restart(server) if server.process else self._wait_for(server))
        except Exception as error:  # nobody waits for this task: said where the server is missed
            server.lost, server.reason = True, f"{error!r} while it was brought back"
        finally:
            self._recovering.discard(server)
            await self.notify()

    async def _restart(self, server: Server) -> None:
        while server.failures < self.settings.restarts:
            server.failures += 1
            self.counters["restarts"] += 1
            try:
                await asyncio.to_thread(server.process.stop)
                while self._asleep:  # its memory is the trainer's now
                    await asyncio.sleep(WATCH_S)
                server.process.start()
                await self._healthy(server)
                if await self._take_in(server):
                    return
            except (ServerError, RolloutError) as error:
                server.reason = str(error)
            if self._asleep:  # it did nothing wrong: the devices are the trainer's now
                server.failures -= 1
        server.lost = True
        await asyncio.to_thread(server.process.stop)

    async def _wait_for(self, server: Server) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            try:
                if await server.client.healthy() and await self._take_in(server):
                    return
            except (ServerError, RolloutError) as error:
                server.reason = str(error)

    async def _take_in(self, server: Server) -> bool:
        """Has a healthy server admitted; False while servers are to hold no memory.

        Raises ServerError or RolloutError.
        """
        async with self.undisturbed:
            if self._asleep:
                return False
            await self._admit(server)
            server.up = True
            return True

    # ------------------------------------------------------------------ all of them

    async def each(self, call: Callable[[Server], Awaitable[Answer]]) -> list[Answer]:
        """Asks every server that is up; takes out those that fail, and returns what the others answer."""
        up = self.up
        results = await asyncio.gather(*(call(server) for server in up), return_exceptions=True)
        for server, result in zip(up, results, strict=True):
            if isinstance(result, ServerError | RolloutError):
                self.down(server, str(result))
            elif isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def any_up(self) -> bool:
        """Waits until a server is up; False: none will come."""
        give_up = time.monotonic() + self.patience_s
        async with self.changed:
            while not self.up:
                left = give_up - time.monotonic()
                if left <= 0 or self.lost:
                    return False
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), left)
        return True

    async def release(self) -> None:
        """The servers give their GPU memory away."""
        async with self.undisturbed:
            self._asleep = True
            # One that is being started is not asked: it ends, and starts again when it may.
            starting = [server.process for server in self._recovering if server.process]
            await asyncio.gather(*(asyncio.to_thread(process.stop) for process in starting))
            await self.each(lambda server: server.client.abort(everything=True))
            await self.each(lambda server: server.client.release(self.settings.update_timeout_s))

    async def resume(self) -> None:
        """The servers take GPU memory again. The weights and the cache that were in it are lost."""
        async with self.undisturbed:
            await self.each(lambda server: server.client.resume(self.settings.update_timeout_s))
            self._asleep = False


async def cancel(tasks: Collection[asyncio.Task]) -> None:
    """Cancels them and waits for their ends."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
