"""Stand-ins that speak SGLang's HTTP and fail on demand, for faults that a real server can't be brought to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from capcur_jax.rollout.engine import Sampling
from capcur_jax.rollout.sglang.client import Client
from capcur_jax.rollout.sglang.fleet import Fleet
from capcur_jax.rollout.sglang.member import Server
from capcur_jax.rollout.sglang.pool import Pool
from capcur_jax.rollout.sglang.settings import Settings
from capcur_jax.rollout.sglang.sync import WeightSync


class Scripted:
    """Answers as a server would, unless `faults` (of /generate) or `broken` (of a path) say otherwise.

    A fault takes (body, the right answer) and returns (status, answer), or None for no answer at all.
    """

    def __init__(self, token: int = 40, delay_s: float = 0.0):
        self.token, self.delay_s = token, delay_s
        self.calls: list[tuple[str, dict]] = []
        self.faults: list = []  # one for each request, then none
        self.broken: dict[str, tuple[int, dict]] = {}
        self.version, self.paused, self.held, self.most = "-1", False, 0, 0
        self.moves: list[str] = []  # parameters that are others after each update
        self.refused_version, self.obeys = "", True
        self.parameters: dict[str, str] = {}
        self._lock, self._free = threading.Lock(), threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self.stopped = False
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                found = None if stand_in.stopped else stand_in.handle(self.path, body)
                if found is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                status, content = found
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = answer

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def handle_error(self, *_):
                pass

        self._free.clear()
        self.stopped = False
        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more, and who waits is cut off."""
        self.stopped = True
        self._free.set()
        self._server.shutdown()
        self._server.server_close()

    def hang(self, body, right):
        """A fault: no answer until the stand-in ends."""
        self._free.wait(60)

    def sent(self, path: str) -> list[dict]:
        return [body for one, body in self.calls if one == path]

    def handle(self, path: str, body: dict):
        asked = body.get("sampling_params")
        if path == "/generate" and isinstance(asked, dict) and asked["max_new_tokens"] == 1:  # the question at a start
            return 200, {"output_ids": [1 if self.obeys else 2]}
        with self._lock:
            self.calls.append((path, body))
            fault = self.faults.pop(0) if path == "/generate" and self.faults else None
        if path in self.broken:
            return self.broken[path]
        if path == "/generate":
            with self._lock:
                self.held += 1
                self.most = max(self.most, self.held)
            time.sleep(self.delay_s)
            right = self.right(body)
            try:
                return fault(body, right) if fault else (200, right)
            finally:
                with self._lock:
                    self.held -= 1
        if path == "/pause_generation":
            self.paused = True
        if path == "/continue_generation":
            self.paused = False
        if path in ("/update_weights_from_disk", "/update_weight_version"):
            assert self.paused
            version = body.get("weight_version") or body["new_version"]
            if version == self.refused_version:
                return 400, {"success": False, "message": "refused"}
            self.version = version
            self.parameters |= dict.fromkeys(self.moves, version)
        if path == "/model_info":
            return 200, {"weight_version": self.version}
        if path == "/weights_checker":
            return 200, {"ranks": [{"checksums": dict(self.parameters), "parallelism_info": [{"rank": 0}]}]}
        return 200, {"success": True}

    def right(self, body: dict) -> list[dict]:
        ids = body["input_ids"]
        many = isinstance(ids[0], list)
        n = len(ids) if many else body["sampling_params"]["n"]
        tokens = [self.token, self.token + 1]
        one = {
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": "length"},
                "prompt_tokens": len(ids[0] if many else ids),
                "output_token_logprobs": [[-1.0, token, None] for token in tokens],
                "weight_version": self.version,
            },
        }
        return [one] * n if n > 1 or many else one


class ScriptedEngine:
    """Fleet, weights and pool in a loop of their own, as the engine has them, over stand-ins."""

    def __init__(self, processor, stand_ins, manages=True, **settings):
        settings = {"concurrency": 2, "request_timeout_s": 20.0, "start_timeout_s": 5.0, **settings}
        self.settings = Settings.from_config({"addresses": [one.address for one in stand_ins], **settings})
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

        async def begin():
            made = [Server(Client(one.address), self.settings.concurrency) for one in stand_ins]
            self.fleet = Fleet(self.settings, made)
            self.sync = WeightSync(self.fleet, processor.config, manages)
            self.pool = Pool(self.fleet, self.sync, processor)
            await self.fleet.start(self.sync.admit)
            self.sync.version = 0

        self.call(begin())

    def call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def generate(self, prompts, n=3, done=None):
        return self.call(self.pool.generate(prompts, Sampling(2), n, 0, done))

    def close(self):
        self.call(self.fleet.close())
        self.loop.call_soon_threadsafe(self.loop.stop)


def wait_for(condition):
    # Long, for a busy machine; what is waited for takes milliseconds.
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)
