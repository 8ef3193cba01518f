"""The processes that decode images: one thread at a time has each, and one that dies is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

START_TIMEOUT_S = 120.0  # on a machine that may be busy compiling
TRIES = 2  # workers that one image may cost
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# The workers get no more of the environment than Python needs: tokens and keys stay out of reach.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONHOME", "VIRTUAL_ENV")


class Died(Exception):
    """A worker ended before it had answered, or its time was over."""


def start_error(reason: str) -> str:
    return (
        f"the image worker ({sys.executable} -m capcur_jax.data.image_worker) can't start: {reason}. Make room for it, "
        "or set config.data.workers to 0: images are decoded in the trainer's own threads then"
    )


class _Worker:
    """One process of `image_worker`, used by one thread at a time."""

    def __init__(self, max_pixels: int, timeout_s: float, memory_mb: int):
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        path = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # UTF-8: names of files that are no text pass as they are. One thread: others would take the address space.
        environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill)
        command = [sys.executable, "-m", "capcur_jax.data.image_worker", str(max_pixels), str(memory_mb)]
        # A program of its own, not a fork (the trainer has JAX's threads), in a session of its own (Ctrl-C is for the
        # trainer to handle).
        self.process = subprocess.Popen(
            [*command, str(timeout_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0,
            start_new_session=True, env=environment,
        )  # fmt: skip
        self._buffer = b""
        self._poll = select.poll()
        self._poll.register(self.process.stdout, select.POLLIN)
        self.ready = False

    def start(self) -> None:
        """Waits until it listens. Raises RuntimeError."""
        try:
            self.ready = self._line(time.monotonic() + START_TIMEOUT_S).get("ready") is True
        except Died as error:
            self._errors.seek(0)
            said = self._errors.read()[-2000:].decode(errors="replace").strip() or str(error)
            raise RuntimeError(start_error(said)) from None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], np.ndarray | None]:
        """The reply and the bytes that came with it. Raises Died."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows when it is read
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        reply = self._line(deadline)
        if "bytes" not in reply:
            return reply, None
        pixels = np.empty(reply["bytes"], np.uint8)
        first = len(self._buffer)
        pixels[:first] = np.frombuffer(self._buffer, np.uint8)
        self._buffer, rest = b"", memoryview(pixels)[first:]
        while rest:
            self._wait(deadline)
            count = os.readv(self.process.stdout.fileno(), [rest])
            if not count:
                raise Died(self._end())
            rest = rest[count:]
        return reply, pixels

    def _line(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._wait(deadline)
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise Died(self._end())
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _wait(self, deadline: float) -> None:
        if not self._poll.poll(max(deadline - time.monotonic(), 0.0) * 1000):
            raise Died("took too long")

    def _end(self) -> str:
        code = self.process.wait()
        return f"ended by signal {-code}" if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            stream.close()


class _Slot:
    """A place for a worker; empty until the first image comes, and after a death."""

    def __init__(self):
        self.worker: _Worker | None = None

    def empty(self) -> None:
        worker, self.worker = self.worker, None
        if worker:
            worker.kill()


class Pool:
    """Workers for any number of threads, which wait for a free one; each is started when it is first needed.

    Args:
      workers: processes.
      max_pixels, timeout_s, memory_mb: of one image; the last is a worker's address space in MiB.

    `deaths` counts workers that ended, or were ended because their time was over, with a request in hand.
    """

    def __init__(self, workers: int, max_pixels: int, timeout_s: float, memory_mb: int):
        self._limits, self._timeout_s = (max_pixels, timeout_s, memory_mb), timeout_s
        self._slots = [_Slot() for _ in range(workers)]
        self._free: queue.LifoQueue[_Slot] = queue.LifoQueue()
        for slot in self._slots:
            self._free.put(slot)
        self._closed = False
        self._owner = os.getpid()
        self.deaths = 0

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        """The reply to a request of `image_worker`, and the bytes [N] uint8 that came with it.

        Raises:
          Died: every worker that was tried; says how the last one ended.
          RuntimeError: workers can't be started, or the pool is closed.
        """
        slot = self._free.get()
        try:
            for left in reversed(range(TRIES)):
                self._fill(slot)
                try:
                    return slot.worker.ask(request, self._timeout_s)
                except Died:
                    slot.empty()
                    self._check_open()
                    self.deaths += 1
                    if not left:
                        raise
            raise AssertionError
        except BaseException:  # an interrupt too: a reply left in a pipe must not answer the next request
            slot.empty()
            raise
        finally:
            self._free.put(slot)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the image workers were closed")

    def _fill(self, slot: _Slot) -> None:
        """Sees to it that the slot has a worker that listens."""
        self._check_open()
        if slot.worker and not slot.worker.alive:  # died at rest: no image's fault
            slot.empty()
        if not slot.worker:
            try:
                slot.worker = _Worker(*self._limits)
            except OSError as error:  # no memory, no process left, ...
                raise RuntimeError(start_error(str(error))) from None
            slot.worker.start()
            self._check_open()  # a pool that was closed meanwhile may have missed this worker

    def processes(self) -> list[int]:
        """Process ids of the workers that there are."""
        return [slot.worker.process.pid for slot in self._slots if slot.worker]

    def close(self) -> None:
        """Ends the workers, unless this is a fork of the process that owns them. Who waits gets RuntimeError."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        for slot in self._slots:  # a thread that reads from one wakes up and empties the slot itself
            worker = slot.worker
            if worker:
                worker.process.kill()
        taken = []
        with contextlib.suppress(queue.Empty):
            for _ in self._slots:
                taken.append(self._free.get(timeout=5))
        for slot in taken:
            slot.empty()
            self._free.put(slot)
