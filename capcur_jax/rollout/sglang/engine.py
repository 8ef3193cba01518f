"""The SGLang engine: servers in an environment of their own, reached by HTTP alone, kept at the trainer's weights.

An event loop in a thread of its own talks to the servers; the trainer's calls hand their work to it. Of several
processes the owner starts the servers and sends them weights; each asks them for samples of its own prompts.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import math
import shutil
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from absl import logging

from capcur_jax.devices import distributed
from capcur_jax.errors import InputError, RolloutError
from capcur_jax.models.batching import PromptSize
from capcur_jax.models.inputs import Processor, Prompt
from capcur_jax.models.lora import LoRA
from capcur_jax.rollout.engine import Health, Sample, Sampling, Told
from capcur_jax.rollout.sglang import checks, manifest
from capcur_jax.rollout.sglang.client import Client, ServerError
from capcur_jax.rollout.sglang.fleet import Fleet
from capcur_jax.rollout.sglang.member import Server
from capcur_jax.rollout.sglang.pool import COUNTERS, Pool
from capcur_jax.rollout.sglang.server import MEMORY, Process, own_servers
from capcur_jax.rollout.sglang.settings import WHERE, Settings
from capcur_jax.rollout.sglang.sync import WeightSync
from capcur_jax.rollout.sglang.weights import WeightStore

PREFIX = "capcur_jax-weights-"
SERVED_PATCH = 1176  # numbers in a patch; of another size SGLang's Qwen2.5-VL takes patches for finished features
Result = TypeVar("Result")


class SGLangEngine:
    """See engine.Engine; `generate` and `update_weights` may be called from two threads at once.

    What `generate` has begun when weights change goes on under the new ones; its samples say in `spans` which tokens
    came from which.

    Args:
        processor: of the checkpoint that the run started from, with the run's own bounds of an image's size.
        source: that checkpoint's directory; the servers serve its config, tokenizer and chat template.
        workdir: the run's; logs of the servers go to WORKDIR/sglang.
        settings: see settings.Settings.
        lora: what the trainer's parameters were made with; the servers get the merged kernels.
        seed: of the servers' sampling.

    Raises:
        InputError: a server that doesn't start, with its log's last lines, or a setting that can't be.
    """

    def __init__(
        self,
        processor: Processor,
        source: str | Path,
        workdir: str | Path,
        settings: Settings,
        *,
        lora: LoRA | None = None,
        seed: int = 0,
    ):
        config = processor.config
        if config.family == "qwen2_5_vl" and config.vision.patch_values != SERVED_PATCH:
            raise InputError(
                f"{source}: SGLang serves Qwen2.5-VL with patches of 14 x 14 pixels alone, this one's are "
                f"{config.vision.patch_size}; use the local engine (config.rollout.engine)"
            )
        self._settings, self._owner, self._closed = settings, distributed.is_owner(), False
        self._complete_next, self._version = True, -1
        self._waiting: set[concurrent.futures.Future] = set()  # calls of the loop that have not ended
        self._fleet: Fleet | None = None
        self._store: WeightStore | None = None
        self._temporary: Path | None = None
        directory = Path(workdir).absolute() / "sglang"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()
        try:
            servers, error = [], ""
            _check_hosts(settings)
            try:
                if self._owner:
                    servers = self._servers(source, directory, seed)
                    self._begin_fleet(processor, servers)
            except InputError as failure:
                error = str(failure)
            addresses = _tell([error, *(one.client.address for one in servers)] if self._owner else [])
            if addresses[0]:
                raise InputError(addresses[0])
            if not self._owner:
                self._begin_fleet(processor, [self._server(address) for address in addresses[1:]])
            self._store = WeightStore(
                self._weights_directory(config, directory), config, jnp.dtype(settings.dtype),
                file_bytes=settings.file_mb * 10**6, lora=lora,
            )  # fmt: skip
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ start and end

    def _servers(self, source: str | Path, directory: Path, seed: int) -> list[Server]:
        """Those that run already, or those that this host is to start."""
        if self._settings.addresses:
            return [self._server(address) for address in self._settings.addresses]
        return [self._server(*own) for own in own_servers(self._settings, source, directory, seed)]

    def _server(self, address: str, process: Process | None = None) -> Server:
        return Server(self._call(_client(address)), self._settings.concurrency, process)

    def _begin_fleet(self, processor: Processor, servers: Sequence[Server]) -> None:
        async def begin() -> None:
            self._fleet = Fleet(self._settings, servers)
            self._sync = WeightSync(self._fleet, processor.config, manages=self._owner)
            self._pool = Pool(self._fleet, self._sync, processor)
            await self._fleet.start(self._sync.admit)

        self._call(begin())

    def _weights_directory(self, config, directory: Path) -> Path:
        """Where weight files go: one place for all processes, which the servers see."""
        if self._settings.weights:
            return Path(self._settings.weights).expanduser().absolute()  # servers have a directory of their own
        chosen = ""
        if self._owner:
            clean_memory()
            numbers = sum(math.prod(shape) for shape in checks.declared(config).values())
            wanted = int(2.2 * numbers * jnp.dtype(self._settings.dtype).itemsize)  # the old ones and the new
            roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > wanted
            if roomy and not self._settings.addresses and distributed.process_count() == 1:
                self._temporary = Path(tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY))
                chosen = str(self._temporary)
            else:
                chosen = str(directory / "weights")
                logging.warning(
                    "weights for the servers go through %s: %s; config.rollout.sglang.weights names a faster place",
                    chosen,
                    f"{MEMORY} has no {wanted / 1e9:.1f} GB free (in a container: --shm-size)"
                    if not roomy
                    else "not all processes and servers are known to share this host's memory",
                )
        return Path(_tell([chosen])[0])

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs it in the loop, and waits."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._waiting.add(future)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: the servers are to stop too
            raise
        finally:
            self._waiting.discard(future)

    def close(self) -> None:
        """See engine.Engine. Servers that it started end, and what it wrote to memory is deleted.

        A `generate` that runs in another thread ends with CancelledError.
        """
        if self._closed:
            return
        self._closed = True
        for future in list(self._waiting):
            future.cancel()
        if self._fleet is not None:
            self._call(self._fleet.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._store is not None:
            self._store.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    # ------------------------------------------------------------------ the contract

    def update_weights(self, parameters: Any, version: int) -> dict[str, float]:
        """See engine.Engine. All processes call it; seconds of gather, write, load (the slowest server's) and verify.

        Files of the version before are deleted once every server has this one. After `resume` the version of before is
        not written again: the servers get its files.
        """
        again = self._complete_next and version == self._version
        update = self._store.last if again else self._store.write(parameters, version)
        seconds, error = {"load": 0.0, "verify": 0.0}, ""
        if self._owner:
            try:
                begun = time.monotonic()
                try:
                    manifest.verify(update.complete if self._complete_next else update.directory)
                except RolloutError as failure:
                    raise RolloutError(f"{failure}; no server is told of it") from None
                read = time.monotonic() - begun
                seconds = self._call(self._sync.update(update, complete=self._complete_next))
                seconds["verify"] += read
            except RolloutError as failure:
                error = str(failure)
        error = _tell([error])[0]
        if error:
            self._complete_next = True  # the servers may lack what the next update builds on
            raise RolloutError(error)
        self._call(self._sync.note(version))
        self._complete_next, self._version = False, version
        self._store.discard(version)
        return {"gather": 0.0, "write": 0.0, **({} if again else update.seconds), **seconds}

    def warm_up(self, sizes: Sequence[PromptSize], sampling: Sampling, n: int, images: bool | None = None) -> None:
        """See engine.Engine; a server compiles nothing for a shape. Raises InputError for prompts it can't hold."""
        longest = max((size.tokens for size in sizes), default=0) + sampling.max_new_tokens
        for server in self._fleet.servers:
            try:
                room = self._call(server.client.room())
            except ServerError:
                continue  # the fleet has it back; `generate` would fail loudly
            if longest > room:
                raise InputError(
                    f"a prompt and its response can be {longest} tokens, the SGLang server {server} holds {room}: "
                    f"raise --context-length or --max-total-tokens in {WHERE}.arguments, or lower "
                    "config.prompt.max_tokens or config.rollout.max_new_tokens"
                )

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int,
        seed: int,
        images: bool | None = None,
        done: Told | None = None,
    ) -> list[list[Sample]]:
        """See engine.Engine; `seed` counts only where servers draw deterministically (docs/rollouts.md)."""
        return self._call(self._pool.generate(prompts, sampling, n, seed, done))

    def health(self) -> Health:
        """See engine.Engine."""
        progress, servers = self._pool.progress, self._fleet.servers
        return Health(
            version=self._version,
            running=progress.running,
            queued=progress.queued,
            tokens_per_second=progress.tokens_per_second,
            servers=len(servers),
            alive=sum(server.up for server in servers),
            refusal=progress.refusal,
        )

    def counters(self) -> dict[str, int]:
        """Counts of failures that were recovered from in this process since the start: see pool.COUNTERS."""
        return {name: self._fleet.counters[name] for name in COUNTERS}

    def release(self) -> None:
        """See engine.Engine. Servers of others (addresses) must have been started with --enable-memory-saver."""
        if self._owner:
            self._call(self._fleet.release())
        distributed.barrier("sglang release")

    def resume(self) -> None:
        """See engine.Engine."""
        if self._owner:
            self._call(self._sync.resume())
        distributed.barrier("sglang resume")
        self._call(self._sync.note(None))
        self._complete_next = True


def clean_memory() -> None:
    """Deletes the weights in memory of runs that were killed: nobody holds their store's lock any more."""
    for left in MEMORY.glob(f"{PREFIX}*/.lock"):
        with contextlib.suppress(OSError), left.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)


def _check_hosts(settings: Settings) -> None:
    """Raises InputError where processes on other hosts could not reach the servers that the owner starts."""
    hosts = np.unique(distributed.exchange(np.array([zlib.crc32(socket.gethostname().encode())])))
    if len(hosts) > 1 and not settings.addresses and settings.host in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
        raise InputError(
            f"{WHERE}.host = {settings.host!r}, and the run's processes are on {len(hosts)} hosts: name the address by "
            f"which all of them reach process 0's host, or start servers yourself and list them in {WHERE}.addresses"
        )


async def _client(address: str) -> Client:
    return Client(address)


def _tell(words: Sequence[str]) -> list[str]:
    """The owner's message, in every process. Collective."""
    if distributed.process_count() == 1:
        return list(words)
    data = np.frombuffer("\0".join(words).encode(), np.uint8) if distributed.is_owner() else None
    return bytes(distributed.broadcast(data)).decode().split("\0")
