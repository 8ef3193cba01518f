"""Keeps the servers of a fleet at the run's weights: what they are to have, and how one gets it.

Everything here runs in the fleet's event loop. A server that fails an update is taken out by the fleet, comes back, and
gets the complete weights before it is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection
from pathlib import Path

from capcur_jax.errors import RolloutError
from capcur_jax.models.config import ModelConfig
from capcur_jax.rollout.sglang import checks
from capcur_jax.rollout.sglang.client import ServerError, TimedOut, Unreachable
from capcur_jax.rollout.sglang.fleet import Fleet
from capcur_jax.rollout.sglang.member import Server
from capcur_jax.rollout.sglang.weights import Update

NONE = -1  # the version of weights that are nobody's: made-up ones, half-loaded ones


class WeightSync:
    """The weights of `fleet`.

    Args:
        config: the model whose weights they are.
        manages: whether weights are sent from here. Of several processes one does that; in the others a server is back
            when it has the version that the run is at.
    """

    def __init__(self, fleet: Fleet, config: ModelConfig, manages: bool = True):
        self.version: int | None = None  # of the run; None: nothing can be sampled
        self._fleet, self._config, self._manages = fleet, config, manages
        self._timeout_s = fleet.settings.update_timeout_s
        self._latest: Update | None = None
        self._checksums: dict[str, int] = {}  # of the tensors that were sent last

    def held(self, server: Server) -> int:
        """The oldest version that answers of `server` may end with, to what it is asked now."""
        # Where weights aren't sent from, it is only known that every server had the run's when it got there.
        return self.version if server.version is None else server.version

    async def note(self, version: int | None) -> None:
        """The run is at `version` now, whichever process has sent it."""
        self.version = version

    async def admit(self, server: Server) -> None:
        """Gives a healthy server the run's weights, or has a look at those that it has. See Fleet.start."""
        if self.version is None:
            return
        if self._manages:
            await self._load(server, self._latest, self._latest.complete)
        elif (has := await server.client.version()) != str(self.version):
            raise Unreachable(f"it has weights of version {has}, the run is at {self.version}")

    async def update(self, update: Update, complete: bool = False) -> dict[str, float]:
        """Every server that is up gets the version; one that fails starts again and gets it then.

        Args:
            complete: whether the servers hold nothing that files of changes alone could build on.

        Returns seconds of "load" and "verify", of the slowest. Raises RolloutError: files that no server is told of
        (nothing has changed then), or if no server has the weights in the end.
        """
        async with self._fleet.undisturbed:
            begun = time.monotonic()
            checksums, source = update.checksums, update.complete
            sent = await asyncio.to_thread(checks.files, source, self._config)
            if not complete and self._latest is not None:
                source = update.directory
                sent = await asyncio.to_thread(checks.files, source, self._config, checksums)
            known = self._checksums
            differing = {name for name, sum in checksums.items() if known.get(name, sum) != sum}
            self._checksums = {**known, **checksums}
            self._latest, self.version = update, update.version
            ready = time.monotonic() - begun
            seconds = await self._fleet.each(lambda server: self._load(server, update, source, sent, differing))
        if not await self._fleet.any_up():
            raise RolloutError(f"weights of version {self.version} reached no server; {self._fleet.dead()}")
        return {
            "load": max((one["load"] for one in seconds), default=time.monotonic() - begun),
            "verify": ready + max((one["verify"] for one in seconds), default=0.0),
        }

    async def resume(self) -> None:
        """The servers take their memory back; what was in it is gone, so that nothing can be sampled before a complete
        update."""
        self.version = self._latest = None
        for server in self._fleet.servers:
            server.checksums = server.version = None
        await self._fleet.resume()

    async def _load(
        self,
        server: Server,
        update: Update,
        source: Path,
        sent: Collection[str] | None = None,
        differing: Collection[str] = (),
    ) -> dict[str, float]:
        """Pauses, loads, verifies, and always goes on: a server that failed without any of our prompts."""
        client, version = server.client, update.version
        begun = time.monotonic()
        try:
            await client.pause()
            if sent == ():
                await client.rename(version)
            else:
                await client.load(source, version, self._timeout_s)
            loaded = time.monotonic()
            if (has := await client.version()) != str(version):
                raise RolloutError(f"after the update it has weights of version {has}, not {version}")
            now = await client.checksums(self._timeout_s)
            wrong = checks.arrived(server.checksums, now, sent or (), differing) or self._unlike_others(server, now)
            if wrong:
                raise RolloutError(f"weights of version {version}: {wrong}")
            server.checksums, server.version = now, version
        except (ServerError, RolloutError) as error:
            server.leave()  # before it goes on: it may hold half of the new weights
            if not isinstance(error, TimedOut | Unreachable):
                with contextlib.suppress(ServerError):  # for other processes, which ask it meanwhile
                    await client.rename(NONE)
            raise
        finally:
            with contextlib.suppress(ServerError):
                await client.proceed()
        return {"load": loaded - begun, "verify": time.monotonic() - loaded}

    def _unlike_others(self, server: Server, now: checks.Ranks) -> str:
        """What is wrong compared with the servers that have the run's weights already."""
        for other in self._fleet.servers:
            if other is server or other.checksums is None or other.version != self.version:
                continue
            if wrong := checks.unequal(other.checksums, now):
                return f"{wrong} of {other.client.address}"
        return ""
