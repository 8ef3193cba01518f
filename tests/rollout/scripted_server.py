"""A server with the OpenAI interface whose replies are a function: for tests, standard library only."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Raw:
    """An answer as it goes over the wire; status 0 hangs up without one."""

    def __init__(
        self, status: int = 200, body: bytes = b"", headers: dict[str, str] | None = None, delay_s: float = 0.0
    ):
        self.status, self.body, self.headers, self.delay_s = status, body, headers or {}, delay_s


def completion(
    text: str | None, finish: str = "stop", chat: bool = True, tokens: int | None = None, thinking: str = ""
) -> bytes:
    """The body of a good answer; `tokens` of it are counted, and a thought kept apart from the text, where given."""
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    if thinking:
        said["message"]["reasoning_content"] = thinking
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return json.dumps(
        {"object": "chat.completion", "choices": [{"index": 0, "finish_reason": finish, **said}], **usage}
    ).encode()


class ScriptedServer:
    """Answers every POST with `reply(body)`: a text, (text, finish reason), or a `Raw`. A context manager.

    `requests` has the body of every request so far, "path" and "headers" added.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Any], port: int = 0):
        self.requests: list[dict[str, Any]] = []
        self._reply, self._lock = reply, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer goes out at once: in pieces each would wait for the last one's receipt

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body |= {"path": self.path, "headers": dict(self.headers)}
                with server._lock:
                    server.requests.append(body)
                self._send(server._answer(body))

            def _send(self, answer: Raw) -> None:
                time.sleep(answer.delay_s)
                if not answer.status:
                    self.close_connection = True
                    self.connection.close()
                    return
                try:
                    self.send_response(answer.status)
                    for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(answer.body)
                    self.wfile.flush()
                except OSError:  # the client went away
                    self.close_connection = True

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256  # by default 5 connections at once, and the sixth is reset

        self._http = Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def texts(self) -> list[str]:
        """The text of the last turn of every request, or its bare prompt; images left out."""
        return [turn_text(body) for body in self.requests]

    def _answer(self, body: dict[str, Any]) -> Raw:
        found = self._reply(body)
        if isinstance(found, Raw):
            return found
        text, finish = found if isinstance(found, tuple) else (found, "stop")
        return Raw(body=completion(text, finish, chat=body["path"].endswith("/chat/completions")))

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def turn_text(body: dict[str, Any]) -> str:
    """The text of a request's last turn, or its bare prompt."""
    if "prompt" in body:
        return body["prompt"]
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def images(body: dict[str, Any]) -> list[tuple[str, bytes]]:
    """(media type, bytes) of the images in a request's last turn, which come before any text."""
    parts, found = body["messages"][-1]["content"], []
    for at, part in enumerate(parts if isinstance(parts, list) else []):
        if part["type"] == "image_url":
            assert all(before["type"] == "image_url" for before in parts[:at]), "a text stands before an image"
            head, data = part["image_url"]["url"].split(";base64,")
            found.append((head.removeprefix("data:"), base64.b64decode(data, validate=True)))
    return found


def has_image(body: dict[str, Any]) -> bool:
    content = body["messages"][-1]["content"] if "messages" in body else ""
    return not isinstance(content, str) and any(part["type"] == "image_url" for part in content)
