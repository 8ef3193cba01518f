"""Questions to models behind servers (SGLang, vLLM, hosted ones; see dialects.py): many at once, with retries.

Not by the package openai: its retries stay at one address, it bounds no answer's size, it takes keys and addresses from
the environment unasked. What would be left for it is one POST.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from PIL import Image

from capcur_jax.errors import InputError, RolloutError
from capcur_jax.rollout.dialects import OPENAI, Dialect, Reply, Unreadable, read_openai
from capcur_jax.rollout.sglang.client import error_message

MAX_BODY = 8 << 20  # bytes of an answer; nobody's few hundred tokens are longer
# <|im_end|>, <|image_pad|>: a server reads them as its own wherever they stand in a text, unlike `Processor.render`.
CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>")
_PATIENCE_S = 60.0  # the longest pause between two tries
_BASE64 = re.compile(r"data:[^\s\"']*|[A-Za-z0-9+/=_-]{80,}")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Failed(Exception):
    """One question got no answer, others may: `reason` to be counted, `detail` for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class _Try(Exception):
    """A try that came to nothing. `again`: another one may not; `gone`: there was no connection."""

    def __init__(self, message: str, again: bool = True, gone: bool = False, wait_s: float = 0.0):
        super().__init__(message)
        self.again, self.gone, self.wait_s = again, gone, wait_s


class _Server:
    def __init__(self, address: str):
        self.address = address.rstrip("/").removesuffix("/v1")
        self.running, self.failures, self.resting_until = 0, 0, 0.0  # failures: in a row


class Chat:
    """One model on one or several equal servers. To be used from one event loop; `ask_all` makes one.

    Args:
      addresses: http(s)://HOST[:PORT][/PATH], with or without /v1 at the end.
      model: the name under which they serve it.
      concurrency: questions under way at once, over all addresses.
      timeout_s: of a whole answer.
      retries: further tries of a question after time-outs, broken connections, 429 and 5xx, on another address if there
        is one, with pauses that double from `pause_s`.
      key_variable: environment variable that holds the API key; "": none is sent.
      dialect: the servers' interface.
      options: what errors call the options that hold an address and the key's variable.

    Raises:
      InputError: an address is no address, or the variable is not set.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        model: str,
        *,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        retries: int = 6,
        pause_s: float = 1.0,
        key_variable: str = "",
        dialect: Dialect = OPENAI,
        options: tuple[str, str] = ("--address", "--api_key_variable"),
    ):
        self._options, self._dialect = options, dialect
        for address in addresses:
            _check_address(address, *options)
        if not addresses or concurrency < 1 or retries < 0 or not timeout_s > 0:
            raise InputError("a chat needs an address, a concurrency of at least 1, and a time-out above 0")
        self._servers = [_Server(address) for address in dict.fromkeys(addresses)]
        self.model, self.concurrency, self._timeout_s = model, concurrency, timeout_s
        self._retries, self._pause_s = retries, pause_s
        self._key = _key(key_variable, options[1])
        self.requests = 0  # tries, the first ones included
        self._answered, self._failed_in_a_row = False, 0
        # Connections are dropped before an idle server does it (5 s), which would look like a dying one. Proxies and
        # .netrc are not looked at: the servers are on this host, in its network, or named by a whole address.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0))
        self._http = httpx2.AsyncClient(
            headers=dialect.headers(self._key), trust_env=False, limits=limits, timeout=timeout
        )

    async def ask(self, messages: Sequence[dict], *, max_tokens: int, temperature: float = 0.0, **more: Any) -> Reply:
        """The reply to a conversation; `more` are further fields of the request.

        Raises:
          Failed: this question gets no answer.
          InputError, RolloutError: none will; before and after the first answer of all.
        """
        body = self._dialect.body(messages, max_tokens, temperature, more)
        return await self._until_answered(self._dialect.path, body, self._dialect.read)

    async def complete(self, prompt: str, *, max_tokens: int, temperature: float = 0.0, **more: Any) -> Reply:
        """How a bare text goes on (/v1/completions, no chat template). Raises as `ask`."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, **more, "stream": False}
        return await self._until_answered("/v1/completions", body, read_openai)

    async def close(self) -> None:
        await self._http.aclose()

    # ------------------------------------------------------------------ tries

    async def _until_answered(self, path: str, body: dict, read: Callable[[bytes | bytearray], Reply]) -> Reply:
        content = json.dumps({"model": self.model, **body}).encode()
        pause, last, gone = self._pause_s, None, True
        for number in range(self._retries + 1):
            server = self._freest(last)
            if number:  # one that another address may answer at once is not held up by the address that failed
                rest = max(0.0, server.resting_until - time.monotonic())
                await asyncio.sleep(min(_PATIENCE_S, max(rest, pause * random.uniform(0.5, 1.0))))
                pause = min(_PATIENCE_S, 2 * pause)
            try:
                reply = self._read(read, await self._try(server, path, content))
            except _Try as error:
                last, failure, gone = server, error, gone and error.gone
                if not error.again:
                    break
                rest = min(_PATIENCE_S, self._pause_s * 2 ** min(server.failures, 10))
                server.failures += 1
                server.resting_until = time.monotonic() + max(error.wait_s, rest)
            else:
                self._answered, self._failed_in_a_row, server.failures = True, 0, 0
                return reply
        self._failed_in_a_row += 1
        # A server that is gone, or many failures in a row, is not this question's fault.
        if gone or self._failed_in_a_row >= max(32, 2 * self.concurrency):
            kind = RolloutError if self._answered else InputError
            raise kind(
                f"no answer from {', '.join(server.address for server in self._servers)} ({failure}); start the "
                f"server or check {self._options[0]}, then give the same command: it goes on"
            )
        raise Failed("refused by the server" if not failure.again else "no answer from the server", str(failure))

    def _freest(self, last: _Server | None) -> _Server:
        others = [server for server in self._servers if server is not last] or self._servers
        now = time.monotonic()
        return min(others, key=lambda server: (server.resting_until > now, server.running))

    async def _try(self, server: _Server, path: str, content: bytes) -> bytearray:
        self.requests += 1
        server.running += 1
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # a compressed one may be a bomb
        try:
            async with asyncio.timeout(self._timeout_s):  # httpx2's own starts anew with every byte
                url = server.address + path
                async with self._http.stream("POST", url, content=content, headers=headers) as answer:
                    status, wait, raw = answer.status_code, answer.headers.get("Retry-After", ""), bytearray()
                    async for part in answer.aiter_raw():
                        raw += part
                        if len(raw) > MAX_BODY:
                            raise _Try(f"an answer of more than {MAX_BODY >> 20} MiB")
        except (TimeoutError, httpx2.TimeoutException) as error:
            gone = isinstance(error, httpx2.ConnectTimeout)
            raise _Try(f"{server.address}: no answer within {self._timeout_s:g} s", gone=gone) from None
        except httpx2.InvalidURL as error:
            raise InputError(f"{server.address}: no address ({error}); check {self._options[0]}") from None
        except (httpx2.HTTPError, OSError) as error:
            gone = isinstance(error, httpx2.ConnectError)
            raise _Try(f"{server.address}: {type(error).__name__} {self._clean(str(error))}", gone=gone) from None
        finally:
            server.running -= 1
        if status != 200:
            raise self._refusal(server, path, status, bytes(raw), wait)
        return raw

    def _read(self, read: Callable[[bytes | bytearray], Reply], raw: bytearray) -> Reply:
        try:
            reply = read(raw)
        except Unreadable as error:
            raise _Try(str(error)) from None
        # A server that repeats the key does not bring it into a file.
        if not self._key:
            return reply
        return reply._replace(
            **{name: getattr(reply, name).replace(self._key, "***") for name in ("text", "finish", "thinking")}
        )

    def _refusal(self, server: _Server, path: str, status: int, raw: bytes, wait: str) -> Exception:
        message = error_message(raw[:10_000].decode("utf-8", "replace"))
        said = f"{server.address}: HTTP {status} {self._clean(message)}".rstrip()
        if status in (401, 403):
            return InputError(f"{said}; name the variable that holds the API key ({self._options[1]})")
        if status in (404, 405) or 300 <= status < 400:
            remedy = f"check {self._options[0]} and the model's name"
            if path == "/v1/completions":
                remedy += "; a server for conversations alone needs --caption_chat"
            return InputError(f"{said} for {path}: {remedy}")
        seconds = float(wait) if re.fullmatch(r"\d{1,6}(\.\d+)?", wait) else 0.0
        return _Try(said, again=status in (408, 409, 425, 429) or status >= 500, wait_s=min(seconds, _PATIENCE_S))

    def _clean(self, text: str) -> str:
        """Without the key, images and control characters, and short: fit for a log."""
        text = text.replace(self._key, "***") if self._key else text
        text = "".join(c if c.isprintable() else " " for c in _BASE64.sub("…", text))
        return text if len(text) <= 300 else text[:299] + "…"


def ask_all(
    chat: Callable[[], Chat],
    items: Iterable[Item],
    ask: Callable[[Chat, Item], Awaitable[Result]],
    done: Callable[[Item, Result | Failed], None],
) -> int:
    """Asks about every item, `Chat.concurrency` of them at a time; returns the requests that were sent.

    Items are drawn as they are needed. `done` is called in this thread, in the order of the answers.

    Raises:
      InputError, RolloutError: no server answers; what was answered is done.
    """

    async def run() -> int:
        client, waiting = chat(), iter(items)

        async def work() -> None:
            for item in waiting:
                try:
                    result: Any = await ask(client, item)
                except Failed as error:
                    result = error
                done(item, result)

        workers = [asyncio.create_task(work()) for _ in range(client.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await client.close()
        return client.requests

    return asyncio.run(run())


def image_part(image: Image.Image) -> dict:
    """An image as a part of a message's content, without loss."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _check_address(address: str, option: str, key_option: str) -> None:
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
        parts = None
    if parts and parts.username is not None:
        raise InputError(f"{option} holds a user name; give a key by {key_option}, so that no log has it")
    if not good or parts.query or parts.fragment:
        raise InputError(f"{option} {address[:100]!r} is no address; give http://HOST:PORT")


def _key(variable: str, option: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        # The variable's name may be a key put in the wrong place: it is not repeated.
        raise InputError(f"{option} names no environment variable that holds a key; export it first")
    return key
