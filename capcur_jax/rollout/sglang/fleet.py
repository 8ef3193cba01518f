"""The servers of an SGLang engine: their start, what becomes of one that fails, and the weights that they hold.

Everything here runs in one event loop. A server takes prompts while `up`; one that isn't is on its way back (restarted
if it is ours, waited for if it is someone else's), gets the current weights whole, and is up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.models.config import ModelConfig
from capcur_jax.rollout.sglang import checks as checks
from capcur_jax.rollout.sglang.client import Client, ServerError, TimedOut, Unreachable
from capcur_jax.rollout.sglang.member import Server, Weights
from capcur_jax.rollout.sglang.settings import WHERE, Settings

WATCH_S = 0.5  # between looks at the processes
PROBE_S = 2.0  # between questions to a server that isn't there
NONE = -1  # the version of weights that are nobody's: made-up ones, half-loaded ones


class Fleet:
    """`servers`, and a `router` before them that prompts go to.

    Args:
        config: the model whose weights they get.
        manages: whether weights are sent from here. Of several processes one does that; in the others a server is back
            when it has the version that the run is at.
    """

    def __init__(
        self,
        settings: Settings,
        config: ModelConfig,
        servers: Sequence[Server],
        router: Server | None = None,
        manages: bool = True,
    ):
        self.settings, self.servers, self.router = settings, list(servers), router
        self.version: int | None = None  # of the run; None: nothing can be sampled
        self.counters: Counter[str] = Counter()
        self.changed = asyncio.Condition()  # a place became free, or a server came or went
        self._config, self._manages = config, manages
        self._weights: Weights | None = None
        self._checksums: dict[str, int] = {}  # of the tensors that were sent last
        self._updating = asyncio.Lock()  # a paused server looks dead: nobody asks for its health meanwhile
        self._tasks: set[asyncio.Task] = set()
        self._recovering: set[Server] = set()
        self._asleep = False

    @property
    def fronts(self) -> list[Server]:
        """Where prompts go."""
        up = [server for server in self.servers if server.up]
        return up if self.router is None or not up else [self.router] if self.router.up else []

    @property
    def everyone(self) -> list[Server]:
        return [*self.servers, *([self.router] if self.router else [])]

    def held(self, front: Server) -> int:
        """The oldest version that answers of `front` may end with, to what it is asked now."""
        behind = [server for server in self.servers if server.up] if front is self.router else [front]
        known = [server.version for server in behind]
        # Where weights aren't sent from, all that is known is that every server had the run's when it got there.
        return self.version if None in known or not known else min(known)

    @property
    def patience_s(self) -> float:
        """Without any server for so long, none will come."""
        ours = any(server.process for server in self.servers)
        return self.settings.start_timeout_s * (1 + self.settings.restarts * ours)

    def dead(self) -> str:
        """Why no server is left, for a message."""
        told = "\n".join(server.told() for server in self.everyone if not server.up)
        return f"no SGLang server is left ({WHERE}.restarts = {self.settings.restarts} in a row)\n{told}"

    # ------------------------------------------------------------------ start and end

    async def start(self) -> None:
        """Starts what is ours and waits for all. Raises InputError with the log's end for one that doesn't come."""
        for server in self.servers:
            if server.process:
                server.process.start()
        waits = [asyncio.create_task(self._started(server)) for server in self.servers]
        try:
            await asyncio.gather(*waits)
            if self.router:
                if self.router.process:
                    self.router.process.start()
                await self._healthy(self.router)
        except ServerError as error:
            culprit = next(server for server in self.everyone if server.reason)
            raise InputError(f"an SGLang server didn't start: {error}\n{culprit.told()}") from None
        finally:
            await cancel(waits)
        for server in self.everyone:
            await self._must_obey(server)
            server.up = True
        self.begin(self._watch())

    async def close(self) -> None:
        await cancel(self._tasks)
        stops = [asyncio.to_thread(server.process.stop) for server in self.everyone if server.process]
        await asyncio.gather(*stops, *(server.client.close() for server in self.everyone))

    def begin(self, work: Awaitable) -> None:
        """Does it beside everything else, until `close`."""
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
                f"sglang-router 0.3.2 drops it; leave {WHERE}.router empty and name servers, not a router, in "
                f"{WHERE}.addresses: prompts are spread over them without one"
            )

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    # ------------------------------------------------------------------ servers that fail

    def doubt(self, server: Server) -> None:
        """Has a server looked at that a request failed on; until then it gets no other, which would fail as fast."""
        for one in self.everyone if server is self.router else [server]:
            if one.up and not one.doubted:
                one.doubted = True
                self.begin(self._look(one))

    async def _look(self, server: Server) -> None:
        try:
            if server.process is None or server.process.ended() is None:
                async with self._updating:
                    if not server.up or self._asleep or await server.client.healthy():
                        return
            self.down(server, "it doesn't answer")
        finally:
            server.doubted = False
            await self.notify()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            for server in self.everyone:
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
                if await self._bring_up(server):
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
                if await server.client.healthy() and await self._bring_up(server):
                    return
            except (ServerError, RolloutError) as error:
                server.reason = str(error)

    async def _bring_up(self, server: Server) -> bool:
        """Gives a healthy server the run's weights and takes it in; False while servers are to hold no memory.

        Raises ServerError or RolloutError.
        """
        async with self._updating:
            if self._asleep:
                return False
            if server is not self.router and self.version is not None:
                if self._manages:
                    await self._load(server, self._weights, self._weights.complete)
                elif (has := await server.client.version()) != str(self.version):
                    raise Unreachable(f"it has weights of version {has}, the run is at {self.version}")
            server.up = True
            return True

    # ------------------------------------------------------------------ weights

    async def update(self, weights: Weights, complete: bool = False) -> dict[str, float]:
        """Every server that is up gets `weights`; one that fails starts again and gets them then.

        Args:
            complete: whether the servers hold nothing that files of changes alone could build on.

        Returns seconds of "load" and "verify", of the slowest. Raises RolloutError: files that no server is told of
        (nothing has changed then), or if no server has the weights in the end.
        """
        async with self._updating:
            begun = time.monotonic()
            sent = await asyncio.to_thread(checks.files, weights.complete, self._config)
            source = weights.complete
            if not complete and self._weights is not None:
                source = weights.directory
                sent = await asyncio.to_thread(checks.files, source, self._config, weights.checksums)
            known = self._checksums
            differing = {name for name, sum in weights.checksums.items() if known.get(name, sum) != sum}
            self._checksums = {**known, **weights.checksums}
            self._weights, self.version = weights, weights.version
            ready = time.monotonic() - begun
            up = [server for server in self.servers if server.up]
            results = await asyncio.gather(
                *(self._load(server, weights, source, sent, differing) for server in up), return_exceptions=True
            )
            self._take_out(up, results)
        await self._one_has_them()
        seconds = [result for result in results if isinstance(result, dict)]
        return {
            "load": max((one["load"] for one in seconds), default=time.monotonic() - begun),
            "verify": ready + max((one["verify"] for one in seconds), default=0.0),
        }

    def _take_out(self, servers: Sequence[Server], results: Sequence[object]) -> None:
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, ServerError | RolloutError):
                self.down(server, str(result))
            elif isinstance(result, BaseException):
                raise result

    async def _one_has_them(self) -> None:
        give_up = time.monotonic() + self.patience_s
        async with self.changed:
            while not any(server.up for server in self.servers):
                left = give_up - time.monotonic()
                if left <= 0 or all(server.lost for server in self.servers):
                    raise RolloutError(f"weights of version {self.version} reached no server; {self.dead()}")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), left)

    async def _load(
        self,
        server: Server,
        weights: Weights,
        source: Path,
        sent: Collection[str] | None = None,
        differing: Collection[str] = (),
    ) -> dict[str, float]:
        """Pauses, loads, verifies, and always goes on: a server that failed without any of our prompts."""
        client, timeout = server.client, self.settings.update_timeout_s
        begun = time.monotonic()
        try:
            await client.pause()
            if sent == ():
                await client.rename(weights.version)
            else:
                await client.load(source, weights.version, timeout)
            loaded = time.monotonic()
            if (has := await client.version()) != str(weights.version):
                raise RolloutError(f"after the update it has weights of version {has}, not {weights.version}")
            now = await client.checksums(timeout)
            wrong = checks.arrived(server.checksums, now, sent or (), differing) or self._unlike_others(server, now)
            if wrong:
                raise RolloutError(f"weights of version {weights.version}: {wrong}")
            server.checksums, server.version = now, weights.version
        except (ServerError, RolloutError) as error:
            server.leave()  # before it goes on: it may hold half of the new weights
            if not isinstance(error, TimedOut | Unreachable):
                with contextlib.suppress(ServerError):  # for other processes, and a router, that ask it meanwhile
                    await client.rename(NONE)
            raise
        finally:
            with contextlib.suppress(ServerError):
                await client.proceed()
        return {"load": loaded - begun, "verify": time.monotonic() - loaded}

    def _unlike_others(self, server: Server, now: checks.Ranks) -> str:
        """What is wrong compared with the servers that have the run's weights already."""
        for other in self.servers:
            if other is server or other.checksums is None or other.version != self.version:
                continue
            if wrong := checks.unequal(other.checksums, now):
                return f"{wrong} of {other.client.address}"
        return ""

    # ------------------------------------------------------------------ memory

    async def release(self) -> None:
        """The servers give their GPU memory away."""
        async with self._updating:
            self._asleep = True
            # One that is being started is not asked: it ends, and starts again when it may.
            starting = [server.process for server in self._recovering if server.process]
            await asyncio.gather(*(asyncio.to_thread(process.stop) for process in starting))
            await self._all(lambda client: client.abort(everything=True))
            await self._all(lambda client: client.release(self.settings.update_timeout_s))

    async def resume(self) -> None:
        """They take it back; what was in it is gone, so that nothing can be sampled before a complete update."""
        async with self._updating:
            self.version = self._weights = None
            for server in self.servers:
                server.checksums = server.version = None
            await self._all(lambda client: client.resume(self.settings.update_timeout_s))
            self._asleep = False

    async def _all(self, call: Callable[[Client], Awaitable]) -> None:
        up = [server for server in self.servers if server.up]
        results = await asyncio.gather(*(call(server.client) for server in up), return_exceptions=True)
        self._take_out(up, results)


async def cancel(tasks: Collection[asyncio.Task]) -> None:
    """Cancels them and waits for their ends."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
