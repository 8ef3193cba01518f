"""The HTTP calls that one SGLang server understands, each with its time-out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

HEALTH_S = 25.0  # an idle server makes a token for the answer and gives itself 20 s
CONTROL_S = 60.0


class ServerError(Exception):
    """A server didn't do what it was asked to; `sent` says whether it may be doing it all the same."""


class Unreachable(ServerError):
    """No connection, or one that broke: the process is gone or going."""


class TimedOut(ServerError):
    """No answer in time."""


class Refused(ServerError):
    """An answer that isn't a success."""

    def __init__(self, status: int, message: str):
        super().__init__(f"HTTP {status}: {message}")
        self.status = status

    @property
    def of_request(self) -> bool:
        """Whether the request is at fault, so that asking again is of no use."""
        return self.status in (400, 413, 422)


def error_message(text: str) -> str:
    """What an error body says, without the request that some of them repeat: that may hold whole images.
    As long as it is: what must not be shown can be found only in the whole text."""
    try:
        found = json.loads(text)
        for key in ("message", "error", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        if isinstance(found, dict):
            found = found.get("message", "")
        if isinstance(found, list):
            found = "; ".join(str(one.get("msg", "")) if isinstance(one, dict) else str(one) for one in found)
        return str(found)
    except (ValueError, RecursionError):  # no JSON, or some that is made to hurt
        return text


class Client:
    """One server. To be used from one event loop."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        # No proxies: the servers are on this host or in its network. No limit of connections: the pool has its own.
        # A connection that is idle is dropped before the server does it (5 s), which would look like a dying server.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        self._http = httpx2.AsyncClient(base_url=self.address, trust_env=False, limits=limits)

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        """The answer, parsed; None for one without a body. Raises ServerError."""
        timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0))
        try:
            answer = await self._http.request(method, path, json=body, timeout=timeout)
        except httpx2.ConnectTimeout as error:
            raise Unreachable(f"{path}: no connection ({error})") from None
        except httpx2.TimeoutException:
            raise TimedOut(f"{path}: no answer within {timeout_s:g} s") from None
        except (httpx2.TransportError, OSError) as error:
            raise Unreachable(f"{path}: {type(error).__name__} {error}") from None
        if not answer.is_success:
            raise Refused(answer.status_code, f"{path}: {error_message(answer.text)[:600]}")
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError:
            return answer.text

    async def generate(self, body: Mapping[str, Any], timeout_s: float) -> Any:
        return await self.call("POST", "/generate", body, timeout_s)

    async def abort(self, rid: str = "", everything: bool = False) -> None:
        await self.call("POST", "/abort_request", {"rid": rid, "abort_all": everything}, CONTROL_S)

    async def healthy(self) -> bool:
        """Whether it makes a token; a paused server doesn't."""
        try:
            await self.call("GET", "/health", None, HEALTH_S)
        except ServerError:
            return False
        return True

    async def obeys(self) -> bool:
        """Whether a logit_bias reaches the sampler; without it, nothing keeps a response from vision placeholders.

        An address can be a router's: sglang-router 0.3.2 passes on what it knows of a request, which logit_bias isn't.
        """
        wanted = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True, "logit_bias": {"1": 1e9}}
        answer = await self.generate({"input_ids": [0], "sampling_params": wanted}, CONTROL_S)
        return answer["output_ids"] == [1]

    async def pause(self) -> None:
        """Stops decoding; running requests go back to the queue, and go on after `proceed` under the new weights."""
        await self.call("POST", "/pause_generation", {"mode": "retract"}, CONTROL_S)

    async def proceed(self) -> None:
        # Nothing of the update is left in PyTorch's cache to be given back; and on a CPU there is none.
        await self.call("POST", "/continue_generation", {"torch_empty_cache": False}, CONTROL_S)

    async def load(self, directory: Path, version: int, timeout_s: float) -> None:
        """Reads every *.safetensors of `directory`. Raises Refused with the server's reason."""
        body = {
            "model_path": str(directory),
            "load_format": "safetensors",  # a server started with made-up weights would make up new ones
            "weight_version": str(version),
            "flush_cache": True,
        }
        await self.call("POST", "/update_weights_from_disk", body, timeout_s)

    async def rename(self, version: int) -> None:
        """The weights that it has are those of another version too."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self.call("POST", "/update_weight_version", body, CONTROL_S)

    async def version(self) -> str:
        return (await self.call("GET", "/model_info", None, CONTROL_S))["weight_version"]

    async def room(self) -> int:
        """Tokens that a prompt and its response may have together."""
        (model, *_) = (await self.call("GET", "/v1/models", None, CONTROL_S))["data"]
        cache = (await self.call("GET", "/server_info", None, CONTROL_S))["max_total_num_tokens"]
        return min(model["max_model_len"], cache)

    async def checksums(self, timeout_s: float) -> list[dict[str, str]]:
        """Of each of the server's ranks: the name of each of its parameters -> a hash of it."""
        answer = await self.call("POST", "/weights_checker", {"action": "checksum"}, timeout_s)
        ranks = sorted(answer["ranks"], key=lambda rank: rank["parallelism_info"][0]["rank"])
        return [rank["checksums"] for rank in ranks]

    async def release(self, timeout_s: float) -> None:
        await self.call("POST", "/release_memory_occupation", {}, timeout_s)

    async def resume(self, timeout_s: float) -> None:
        await self.call("POST", "/resume_memory_occupation", {}, timeout_s)

    async def close(self) -> None:
        await self._http.aclose()
