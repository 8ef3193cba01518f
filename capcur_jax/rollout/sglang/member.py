"""A server as its fleet sees it: whether it takes prompts, how many it has, and which weights it was given."""

from __future__ import annotations

import asyncio
import dataclasses

from capcur_jax.rollout.sglang import checks
from capcur_jax.rollout.sglang.client import Client
from capcur_jax.rollout.sglang.server import Process


@dataclasses.dataclass(eq=False)
class Server:
    """A server, ours or someone else's."""

    client: Client
    limit: int  # prompts in flight
    process: Process | None = None  # None: someone else's
    up: bool = False
    doubted: bool = False  # being asked whether it is well; gets no prompts meanwhile
    lost: bool = False  # for good
    busy: int = 0  # prompts in flight
    failures: int = 0  # starts in a row without an answer
    reason: str = ""  # of its last failure
    calls: set[asyncio.Future] = dataclasses.field(default_factory=set)
    version: int | None = None  # of the weights that it was given last
    checksums: checks.Ranks | None = None  # after that

    def __str__(self) -> str:
        return self.client.address + (f" (log: {self.process.log})" if self.process else "")

    def told(self) -> str:
        """Why it isn't there, for a message."""
        text = f"{self}: {self.reason or 'no answer'}"
        return text + (f"\n{self.process.tail()}" if self.process else "")

    def leave(self) -> None:
        """Takes no prompts any more, and fails those that it has."""
        self.up = False
        for call in list(self.calls):
            call.cancel()
