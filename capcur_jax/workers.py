"""Worker processes that untrusted input may hang, bloat or crash: the pool that asks them, and the loop that answers.

A program is started as `python -m MODULE MEMORY_MB TIMEOUT_S ARGUMENT...` and speaks JSON lines over its pipes:

    worker: {"ready": true}                          or {"ready": false, "error": "..."} and the end
    parent: any request, with its "number"
    worker: any reply, with the same number; {..., "bytes": 12} is followed by 12 bytes, {..., "last": true} by the end

The parent's clock kills a worker that takes too long. The limits that a worker sets on itself hold if the parent is
gone. The address space is limited on Linux only: macOS does not support it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0  # on a machine that may be busy compiling
CLOSE_TIMEOUT_S = 5.0  # for threads whose worker was killed to let go of it
_LONGEST_LINE = 65536  # bytes; also what fits into an empty pipe
_PACKAGE_ROOT = Path(__file__).resolve().parents[1]
# The workers get no more of the environment than Python needs: tokens and keys stay out of reach.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONHOME", "VIRTUAL_ENV")
_SETTINGS = {
    "PYTHONHASHSEED": "0",  # sympy's order of terms, and so what it manages to prove, follows it
    "PYTHONUTF8": "1",  # names of files that are no text pass as they are
    "OPENBLAS_NUM_THREADS": "1",  # others would take the address space
}


class Died(Exception):
    """A worker ended before it had answered, or wrote what is no reply."""


class TimedOut(Died):
    """A worker's time was over."""


# ---------------------------------------------------------------------- the parent's side


class Worker:
    """One worker process, used by one thread at a time.

    Args:
      module: the program, which calls `serve`.
      memory_mb: its address space in MiB.
      timeout_s: seconds for one request.
      arguments: of the program, after these.
      environment: of the process; None: what Python needs, and no more.

    Raises:
      OSError: no memory, no process left, ...
    """

    def __init__(
        self,
        module: str,
        memory_mb: int,
        timeout_s: float,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self._timeout_s = timeout_s
        if environment is None:
            environment = {name: os.environ[name] for name in (*_ENVIRONMENT, "PYTHONPATH") if name in os.environ}
        path = [str(_PACKAGE_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill)
        # A program of its own, not a fork (the trainer has JAX's threads), in a session of its own (Ctrl-C is for the
        # trainer to handle).
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(memory_mb), str(timeout_s), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0, start_new_session=True,
            env={**environment} | _SETTINGS | {"PYTHONPATH": os.pathsep.join(path)},
        )  # fmt: skip
        self._buffer, self._number = b"", 0
        self._poll, self._room = select.poll(), select.poll()
        self._poll.register(self.process.stdout, select.POLLIN)
        self._room.register(self.process.stdin, select.POLLOUT)
        os.set_blocking(self.process.stdin.fileno(), False)

    def start(self) -> None:
        """Waits until it listens. Raises Died with the last that it said."""
        try:
            reply = self._line(time.monotonic() + START_TIMEOUT_S)
        except TimedOut:
            raise Died(self._last_words() or f"no sign of life in {START_TIMEOUT_S:.0f} s") from None
        if not reply.get("ready"):
            raise Died(reply.get("error", "no reason given"))

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytearray | None]:
        """The reply and the bytes that came with it. Raises Died, TimedOut among them."""
        deadline = time.monotonic() + self._timeout_s
        self._number += 1
        os.ftruncate(self._errors.fileno(), 0)  # the last words are to be of this request
        os.lseek(self._errors.fileno(), 0, os.SEEK_SET)  # the worker's place, too
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows when it is read
            rest = memoryview(json.dumps(request | {"number": self._number}).encode() + b"\n")
            while rest:
                self._wait(deadline, self._room)
                rest = rest[os.write(self.process.stdin.fileno(), rest) :]
        reply = self._line(deadline)
        if reply.pop("number", None) != self._number:
            raise Died("wrote a reply to another request")
        payload = bytearray(reply["bytes"]) if "bytes" in reply else None
        rest = memoryview(bytearray() if payload is None else payload)
        first, self._buffer = self._buffer[: len(rest)], self._buffer[len(rest) :]
        rest[: len(first)], rest = first, rest[len(first) :]
        while rest:
            self._wait(deadline)
            count = os.readv(self.process.stdout.fileno(), [rest])
            if not count:
                raise Died(self._end())
            rest = rest[count:]
        if self.left_over():
            raise Died("wrote more than its reply")
        return reply, payload

    def left_over(self) -> bool:
        """Whether it wrote more than replies: they would answer the next request."""
        if any(event & select.POLLIN for _, event in self._poll.poll(0)):
            self._buffer += os.read(self.process.stdout.fileno(), _LONGEST_LINE)
        return bool(self._buffer)

    def _line(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._wait(deadline)
            data = os.read(self.process.stdout.fileno(), _LONGEST_LINE)
            if not data:
                raise Died(self._end())
            self._buffer += data
            if len(self._buffer) > _LONGEST_LINE and b"\n" not in self._buffer:
                raise Died("wrote what is no reply")
        line, _, self._buffer = self._buffer.partition(b"\n")
        with contextlib.suppress(ValueError):
            if isinstance(reply := json.loads(line), dict):
                return reply
        raise Died("wrote what is no reply")

    def _wait(self, deadline: float, poll: select.poll | None = None) -> None:
        if not (poll or self._poll).poll(max(deadline - time.monotonic(), 0.0) * 1000):
            raise TimedOut("took too long")

    def _end(self) -> str:
        limit = time.monotonic() + 1.0
        while (code := self.code()) is None:
            if time.monotonic() > limit:
                return "closed its pipe"
            time.sleep(0.005)
        said = f"ended by signal {-code}" if code < 0 else f"exit status {code}"
        return ": ".join(filter(None, [said, self._last_words()]))

    def code(self) -> int | None:
        """The exit code once it has ended. Until `kill` it is not waited for: its number stays that of its group."""
        if self.process.returncode is not None or not hasattr(os, "waitid"):  # macOS has it since Python 3.13
            return self.process.poll()
        found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found and (found.si_status if found.si_code == os.CLD_EXITED else -found.si_status)

    def _last_words(self) -> str:
        """The end of what the process wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read()[-2000:].decode(errors="replace").strip()

    def signal(self) -> None:
        """Tells the process, and what it has started, to end; the latter also where it has ended itself."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS lets nobody signal a zombie
            if self.process.returncode is None:  # else its number may be another's
                os.killpg(self.process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Ends the process and waits for it."""
        self.signal()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            stream.close()


class _Slot:
    """A place for a worker; empty until the first request comes, and after a death."""

    worker: Worker | None = None

    def empty(self) -> None:
        worker, self.worker = self.worker, None
        if worker:
            worker.kill()


class Pool:
    """Workers for any number of threads, which wait for a free one; each is started when it is first needed.

    Args:
      count: processes.
      module, memory_mb, timeout_s: of a worker.
      name: of a worker, for messages ("the image worker").
      remedy: what to do where a worker can't be started, for messages.
      tries: workers that one request may cost.
      arguments, environment: of a worker.

    `deaths` counts workers that ended, or were ended because their time was over, with a request in hand.
    """

    def __init__(
        self,
        count: int,
        module: str,
        memory_mb: int,
        timeout_s: float,
        *,
        name: str,
        remedy: str,
        tries: int = 1,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self._program = module, memory_mb, timeout_s, arguments, environment
        self._name, self._remedy, self._tries = name, remedy, tries
        self._slots = [_Slot() for _ in range(count)]
        self._free: queue.LifoQueue[_Slot] = queue.LifoQueue()
        for slot in self._slots:
            self._free.put(slot)
        self._closed = False
        self._owner = os.getpid()
        self._counting = threading.Lock()
        self.deaths = 0

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytearray | None]:
        """The reply to a request, and the bytes that came with it.

        Raises:
          Died: every worker that was tried; says how the last one ended. TimedOut where its time was over.
          RuntimeError: workers can't be started, or the pool is closed.
        """
        with self._taken() as slot:
            for left in reversed(range(self._tries)):
                self._fill(slot)
                try:
                    reply, payload = slot.worker.ask(request)
                except Died:
                    slot.empty()
                    self._check_open()
                    with self._counting:
                        self.deaths += 1
                    if not left:
                        raise
                else:
                    if reply.get("last"):
                        slot.empty()
                    return reply, payload
            raise AssertionError

    def start(self) -> None:
        """Starts a worker now, if there is none. Raises RuntimeError."""
        with self._taken() as slot:
            self._fill(slot)

    @contextlib.contextmanager
    def _taken(self) -> Iterator[_Slot]:
        slot = self._free.get()
        try:
            yield slot
        except BaseException:  # an interrupt too: a reply left in a pipe must not answer the next request
            slot.empty()
            raise
        finally:
            self._free.put(slot)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self._name}s were closed")

    def _fill(self, slot: _Slot) -> None:
        """Makes sure that the slot has a worker that listens."""
        self._check_open()
        if slot.worker and (slot.worker.code() is not None or slot.worker.left_over()):  # no fault of this request
            slot.empty()
        if not slot.worker:
            try:
                slot.worker = Worker(*self._program)
                slot.worker.start()
            except (OSError, Died) as error:
                self._check_open()
                command = f"{sys.executable} -m {self._program[0]}"
                raise RuntimeError(f"{self._name} ({command}) can't start: {error}. {self._remedy}") from None
            self._check_open()  # a pool that was closed meanwhile may have missed this worker

    def processes(self) -> list[int]:
        """Process ids of the workers that there are."""
        return [slot.worker.process.pid for slot in self._slots if slot.worker]

    def close(self) -> None:
        """Ends the workers, unless this is a fork of the process that owns them. Threads that wait get RuntimeError."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        for slot in self._slots:  # a thread that reads from one wakes up and empties the slot itself
            if worker := slot.worker:
                worker.signal()
        taken = []
        with contextlib.suppress(queue.Empty):
            taken.extend(self._free.get(timeout=CLOSE_TIMEOUT_S) for _ in self._slots)
        for slot in taken:
            slot.empty()
            self._free.put(slot)


# ---------------------------------------------------------------------- the worker's side


def serve(
    answer: Callable[[dict[str, Any]], tuple[dict[str, Any], bytes | None]],
    prepare: Callable[[], None] = lambda: None,
    trusted: bool = False,
) -> None:
    """Answers requests until the parent closes the pipe: all that a worker program does.

    Args:
      answer: gives the reply to a request, and the bytes that go with it or None. What it raises ends the process.
      prepare: imports and warms up what is slow, under the limits of memory. What it raises is told to the parent.
      trusted: the program is the user's own: it may write files, take as much memory as it likes to `prepare`, and use
        every core at once. Its limits hold for what it does about a request.
    """
    memory_mb, timeout_s = int(sys.argv[1]), float(sys.argv[2])
    # Copies of the pipes: what a library prints must not look like a reply, and what it reads must not be a request.
    requests, replies, own = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0), os.getpid()
    for number in (0, 1):
        os.dup2(devnull := os.open(os.devnull, os.O_RDWR), number)

    def reply(message: dict[str, Any], payload: bytes | None = None) -> None:
        size = {} if payload is None else {"bytes": len(payload)}
        replies.write(json.dumps(message | size).encode() + b"\n")
        rest = memoryview(payload or b"")
        while rest:
            rest = rest[replies.write(rest) :]

    with contextlib.suppress(BrokenPipeError):
        try:
            limit(resource.RLIMIT_CORE, 0)
            if not trusted:
                limit_memory(memory_mb * 2**20)
            prepare()
            if trusted:
                limit_memory(memory_mb * 2**20, beyond=True)
            else:
                limit(resource.RLIMIT_FSIZE, 0)
        except Exception as error:  # whatever it is, the parent reports it with the remedy
            reply({"ready": False, "error": f"{type(error).__name__}: {error}"})
            sys.exit(1)
        if not trusted:
            os.dup2(devnull, 2)
        reply({"ready": True})
        for line in requests:
            request = json.loads(line)
            number = request.pop("number")
            roll_cpu_limit(timeout_s * (os.cpu_count() or 1) if trusted else timeout_s)
            message, payload = answer(request)
            if os.getpid() != own:  # a fork that came back
                os._exit(0)
            reply(message | {"number": number}, payload)
            if message.get("last"):
                break


def limit(kind: int, value: int) -> None:
    """Sets a soft and hard resource limit, no higher than the hard limit already there."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def limit_memory(size: int, beyond: bool = False) -> None:
    """Limits the address space to so many bytes, or to so many `beyond` what there is now; on Linux alone."""
    if sys.platform == "darwin":
        return
    if beyond:
        with open("/proc/self/statm", encoding="ascii") as file:
            size += int(file.read().split()[0]) * resource.getpagesize()
    limit(resource.RLIMIT_AS, size)


def roll_cpu_limit(timeout_s: float) -> None:
    """Allows the next request its time of CPU: ends this process if the parent died and cannot."""
    soft = math.ceil(time.process_time() + timeout_s) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
