"""Serves a run's checkpoint with SGLang on this host, for a trainer on others.

python -m capcur_jax.rollout.sglang --config=FILE[:preset] --workdir=DIR [--register=DIR] [--config.key=value ...]

It takes the command line of the trainer. The servers are those that a trainer would start on its own host
(config.rollout.sglang: python, servers, tensor_parallel, gpus, port, arguments, ...). They run until SIGTERM, and are
started again when they end.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from capcur_jax import presets
from capcur_jax.errors import InputError
from capcur_jax.files import write_atomically
from capcur_jax.hub import download
from capcur_jax.rollout.sglang.client import Client
from capcur_jax.rollout.sglang.fleet import Fleet
from capcur_jax.rollout.sglang.member import Server
from capcur_jax.rollout.sglang.server import own_servers
from capcur_jax.rollout.sglang.settings import WHERE, Settings


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m capcur_jax.rollout.sglang", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--config", required=True, help="the run's config file")
    add("--workdir", required=True, type=Path, help="the run's folder: logs go to WORKDIR/sglang/HOST")
    add(
        "--host", default=socket.gethostname(), help="where they listen, as the trainer calls it (default: %(default)s)"
    )
    add("--register", type=Path, help="a folder for HOST.txt, which has the addresses once all are healthy")
    # Flags of capcur_jax.main that mean nothing to a server.
    add("--profile", "--push_to_hub", "--coordinator", "--process_id", "--process_count", help=argparse.SUPPRESS)
    add("--accept_changed_inputs", "--noaccept_changed_inputs", nargs="?", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options, overrides = parser().parse_known_args(arguments)
    try:
        config = presets.read(options.config, overrides)
        given = config.rollout.sglang.to_dict() | {"addresses": (), "host": options.host}
        settings = Settings.from_config(given)
        if settings.colocate:
            raise InputError(
                f"{WHERE}.colocate: servers of another host take no turns with the trainer; set it to False"
            )
        return asyncio.run(_serve(settings, config, options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


async def _serve(settings: Settings, config, options: argparse.Namespace) -> int:
    asked, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    folder = options.workdir.absolute() / "sglang" / options.host
    seed = config.seed + zlib.crc32(options.host.encode()) % 2**20  # hosts draw different samples
    source = download.checkpoint(config.checkpoint, weights=False)
    servers = [
        Server(Client(address), settings.concurrency, process)
        for address, process in own_servers(settings, source, folder, seed)
    ]
    fleet = Fleet(settings, servers)
    stopped = asyncio.ensure_future(asked.wait())
    try:
        start = asyncio.ensure_future(fleet.start(_well))
        await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            return 0
        start.result()
        addresses = "".join(f"'{server.client.address}'," for server in servers)
        if options.register:
            write_atomically(options.register / f"{options.host}.txt", addresses.encode())
        print(f'healthy: --config.rollout.engine=sglang --{WHERE}.addresses="({addresses})"', flush=True)
        while not stopped.done():
            await asyncio.wait({stopped}, timeout=1.0)
            if fleet.lost:
                raise InputError(fleet.dead())
        return 0
    finally:
        stopped.cancel()
        await fleet.close()


async def _well(server: Server) -> None:
    """A server came back. The trainer notices that it lost its weights, and gives it the complete set."""
    server.failures = 0


if __name__ == "__main__":
    sys.exit(main())
