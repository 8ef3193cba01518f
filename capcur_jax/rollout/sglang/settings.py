"""The section config.rollout.sglang: which servers, how they are started, and what is asked of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from capcur_jax import bounds
from capcur_jax.errors import InputError

DEVICES = ("cuda", "cpu")
DTYPES = ("bfloat16", "float16", "float32")
WHERE = "config.rollout.sglang"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Defaults are for a GPU host. Seconds are wall time."""

    addresses: tuple[str, ...] = ()  # http://HOST:PORT of servers that already run; (): start some
    servers: int = 1  # to start on this host
    tensor_parallel: int = 1  # GPUs of a server
    gpus: tuple[int, ...] = ()  # servers x tensor_parallel ids, server after server; (): 0, 1, ...
    device: str = "cuda"  # or "cpu", for small models and tests
    python: str = ""  # executable of the environment that has SGLang
    environment: tuple[str, ...] = ()  # further variables of the servers, NAME=VALUE
    arguments: tuple[str, ...] = ()  # further flags of the servers; they win over ours
    host: str = "127.0.0.1"  # where started servers listen; they know no password
    port: int = 0  # of the first server, counting up; 0: free ones
    concurrency: int = 64  # prompts, each with its whole group, in flight on a server
    request_timeout_s: float = 900.0  # for a prompt's whole group
    start_timeout_s: float = 900.0  # for a server to be healthy
    update_timeout_s: float = 600.0  # for a server to load new weights
    retries: int = 5  # further tries for a prompt, on another server where there is one
    restarts: int = 3  # of a server in a row, without an answer from it in between
    dtype: str = "bfloat16"  # of the weights that are sent and served
    memory_fraction: float = 0.0  # --mem-fraction-static; 0: the server's own choice
    weights: str = ""  # directory for weight files, seen by all servers; "": /dev/shm, or the work directory
    file_mb: int = 512  # of a weight file, about
    colocate: bool = False  # servers and trainer take turns on the same GPUs

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> Settings:
        """Raises InputError naming the key for one that doesn't exist and for a value that can't be."""
        given = section.to_dict() if hasattr(section, "to_dict") else dict(section)
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in given:
            if key not in known:
                raise InputError(f"{WHERE}.{key} does not exist; known: {', '.join(known)}")
        for key in ("addresses", "gpus", "arguments", "environment"):
            if key in given:
                given[key] = tuple(given[key])
        settings = cls(**given)
        settings._check()
        return settings

    def _check(self) -> None:
        def need(holds: bool, key: str, remedy: str) -> None:
            if not holds:
                raise InputError(f"{WHERE}.{key} = {getattr(self, key)!r}: {remedy}")

        need(self.device in DEVICES, "device", f"must be one of {', '.join(DEVICES)}")
        need(self.dtype in DTYPES, "dtype", f"must be one of {', '.join(DTYPES)}")
        bounds.check(dataclasses.asdict(self), WHERE.removeprefix("config."))
        need(all("=" in one for one in self.environment), "environment", "each must be NAME=VALUE")
        for address in self.addresses:
            need(address.startswith(("http://", "https://")), "addresses", "each must be http://HOST:PORT")
        need(len(set(self.addresses)) == len(self.addresses), "addresses", "names a server twice")
        need(self.port < 65536 - self.servers, "port", "must leave room for all servers below 65536")
        wanted = self.servers * self.tensor_parallel
        need(
            not self.gpus or (len(self.gpus) == wanted and len(set(self.gpus)) == wanted), "gpus",
            f"must be () or {wanted} different ids: {self.servers} servers x tensor_parallel = {self.tensor_parallel}",
        )  # fmt: skip
        need(
            bool(self.python or self.addresses), "python",
            "name the Python of the environment that has SGLang (docs/rollouts.md says how to make one), or addresses "
            "of servers that run",
        )  # fmt: skip
        need(not (self.colocate and self.device == "cpu"), "colocate", "only GPUs are taken in turns; set it to False")

    @property
    def deterministic(self) -> bool:
        """Whether servers draw a response from its own seed; only servers that we start are known to."""
        return "--enable-deterministic-inference" in self.arguments
