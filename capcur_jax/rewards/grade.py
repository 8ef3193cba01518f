"""Compare predicted answers with gold ones: cheap rules in this process, math-verify in processes that can be killed.

Predictions are untrusted. What is decided here works on at most `MAX_LENGTH` characters with linear rules and exact
fractions of bounded size; sympy, which hangs on `9^{9^{9^9}}`, only ever sees a prediction in a worker (`worker.py`).
"""

import collections
import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from capcur_jax.data import answers

MAX_LENGTH = 512  # characters; a longer prediction is wrong outright
START_TIMEOUT_S = 120.0  # a worker imports sympy, on a machine that may be busy compiling
_LEAST = {"workers": 1, "timeout_s": 0.1, "memory_mb": 128}
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# The workers get no more of the environment than Python needs: tokens and keys stay out of reach.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONHOME", "VIRTUAL_ENV")


def _equal_numbers(predicted: answers.Number, gold: answers.Number) -> bool:
    """Exact equality; see `decide` for what the forms and the percent sign change."""
    if gold.form == "integer" and predicted.form == "fraction" and not gold.percent:
        return False
    if predicted.percent == gold.percent:
        pairs = [(predicted.value, gold.value)]
    else:
        share, other = (predicted, gold) if predicted.percent else (gold, predicted)
        pairs = [(share.value, other.value), (share.value / 100, other.value)]
    rounds = {predicted.form, gold.form} == {"fraction", "decimal"}
    return any(a == b or (rounds and round(a, 6) == round(b, 6)) for a, b in pairs)


def decide(predicted: str | None, gold: str) -> bool | tuple[str, str]:
    r"""The verdict where cheap rules reach one, else the (predicted, gold) that math-verify has to compare.

    1. Nothing, blanks and more than `MAX_LENGTH` characters are wrong. Equal normalized texts are right.
    2. A gold answer of words or letters is compared as words, without case, brackets and punctuation; math-verify
       reads words as products of symbols (left == felt, no == on). So a gold "xy" is a word too.
    3. A gold number wants a finished number: `x = 5` and "5 cm" do, `2+3`, `5!`, `\sqrt{25}` and, for a gold integer,
       `10/2` do not. (math-verify takes them, and even "5 6" for 11: for a policy the way around doing the sum. The
       release wants an exact match for integers.) Numbers are compared exactly; a fraction equals its decimal when
       they agree to six places, as in math-verify. A percentage equals the number with or without the sign and the
       share it is: 50% is 50 and 0.5.
    4. The rest is for math-verify, unless both contain words and these differ ("Room 12", "Moor 12").
    """
    if not predicted or not gold or len(predicted) > MAX_LENGTH or len(gold) > MAX_LENGTH:
        return False
    predicted, gold = answers.normalize(predicted), answers.normalize(gold)
    if not predicted or not gold:
        return False
    if predicted == gold:
        return True
    gold_words = answers.words(gold)
    if gold_words is not None:
        return answers.words(predicted) == gold_words
    gold_number = answers.plain_number(gold)
    if gold_number is not None:
        predicted = answers.claimed_number(predicted)
        number = answers.plain_number(predicted)
        if number is not None:
            return _equal_numbers(number, gold_number)
        return (predicted, gold) if answers.is_number_with_unit(predicted) else False
    words, expected = answers.long_words(predicted), answers.long_words(gold)
    if words and expected and words != expected:
        return False
    return predicted, gold


# ---------------------------------------------------------------- worker processes


class _Worker:
    """One worker process and what it is doing; `job` is an index or None, `deadline` a time of the monotonic clock."""

    def __init__(self, timeout_s: float, memory_mb: int):
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        path = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # The hash seed is fixed because sympy's order of terms, and so what it manages to prove, follows it.
        environment |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "0"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill)
        # A program of its own, not a fork (the trainer has JAX's threads), in a session of its own (Ctrl-C is for the
        # trainer to handle).
        self.process = subprocess.Popen(
            [sys.executable, "-m", "capcur_jax.rewards.worker", str(memory_mb), str(timeout_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0, start_new_session=True,
            env=environment,
        )  # fmt: skip
        self.ready = False
        self.job: int | None = None
        self.buffer = b""
        self.deadline = time.monotonic() + START_TIMEOUT_S

    def send(self, job: int, predicted: str, gold: str, timeout_s: float) -> None:
        """Hands out a pair. It fits into an empty pipe, so this never blocks; a dead worker shows when it is read."""
        self.job, self.deadline = job, time.monotonic() + timeout_s
        request = json.dumps({"id": job, "gold": gold, "predicted": predicted}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(request)

    def receive(self) -> dict | None:
        """The next reply, None while it is incomplete. Raises EOFError from a worker that died or talks nonsense."""
        data = os.read(self.process.stdout.fileno(), 65536)
        self.buffer += data
        if not data or len(self.buffer) > 65536:
            raise EOFError
        line, end, rest = self.buffer.partition(b"\n")
        if not end:
            return None
        self.buffer = rest
        try:
            reply = json.loads(line)
        except ValueError as error:
            raise EOFError from error
        if not isinstance(reply, dict):
            raise EOFError
        return reply

    def last_words(self) -> str:
        """The end of what the process wrote to stderr."""
        self.errors.seek(0)
        return self.errors.read()[-2000:].decode(errors="replace").strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            stream.close()


def _kill_all(workers: list[_Worker], owner: int) -> None:
    """Ends the workers, unless this is a fork of the process that owns them."""
    while workers and os.getpid() == owner:
        workers.pop().kill()


class Grader:
    """Grades answers; safe to call from several threads, which take turns at the workers.

    Args:
      workers: processes that run math-verify, started when the first pair needs one.
      timeout_s: wall-clock seconds for one pair.
      memory_mb: address space of one worker in MiB.

    `timeouts` counts pairs whose worker had to be killed, `failures` those whose worker died or took most of its
    memory. The worker is replaced, and a pair without a verdict is wrong.

    Raises:
      RuntimeError: math-verify is not installed.
      ValueError: a setting is out of range.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_mb: int = 1024):
        for name, value in (("workers", workers), ("timeout_s", timeout_s), ("memory_mb", memory_mb)):
            least = _LEAST[name]
            if not least <= value < float("inf"):
                raise ValueError(f"config.reward.{name} is {value}; set it to {least} or more")
        if importlib.util.find_spec("math_verify") is None:
            raise RuntimeError(_start_error("the package math_verify is not installed"))
        self.timeouts = 0
        self.failures = 0
        self._count = int(workers)
        self._timeout_s = float(timeout_s)
        self._memory_mb = int(memory_mb)
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        weakref.finalize(self, _kill_all, self._workers, self._owner)  # also runs at exit

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. Grading again starts new ones."""
        with self._lock:
            _kill_all(self._workers, self._owner)

    def grade(self, pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
        """Whether each (predicted, gold) agrees, in the order given; `decide` has the rules.

        Equal pairs are compared once: the samples of a group often agree.

        Raises:
          RuntimeError: a worker can't be started.
        """
        verdicts = [decide(predicted, gold) for predicted, gold in pairs]
        jobs = list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, tuple)))
        if jobs:
            with self._lock:
                compared = dict(zip(jobs, self._compare(jobs), strict=True))
            verdicts = [compared[verdict] if isinstance(verdict, tuple) else verdict for verdict in verdicts]
        return verdicts

    def _compare(self, jobs: list[tuple[str, str]]) -> list[bool]:
        """Compares all jobs, one in flight for each worker."""
        waiting = collections.deque(range(len(jobs)))
        equal = [False] * len(jobs)
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                self._hand_out(waiting, jobs)
                self._collect(equal)
        except BaseException:  # an interrupt too: a reply left in a pipe must not answer the next call
            _kill_all(self._workers, self._owner)
            raise
        return equal

    def _hand_out(self, waiting: collections.deque[int], jobs: list[tuple[str, str]]) -> None:
        for worker in [w for w in self._workers if w.ready and w.job is None]:
            if worker.process.poll() is not None:  # died at rest: no pair's fault
                self._drop(worker)
            elif waiting:
                job = waiting.popleft()
                worker.send(job, *jobs[job], self._timeout_s)
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(self._count - len(self._workers), len(waiting) - starting)):
            try:
                self._workers.append(_Worker(self._timeout_s, self._memory_mb))
            except OSError as error:  # no memory, no process left, ...
                raise RuntimeError(_start_error(str(error))) from error

    def _collect(self, equal: list[bool]) -> None:
        """Waits for the next reply or deadline and acts on it."""
        active = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            nearest = min((worker.deadline for worker in active), default=0.0)
            events = selector.select(max(nearest - time.monotonic(), 0.0))
        for key, _ in events:
            self._read(key.data, equal)
        now = time.monotonic()
        for worker in [w for w in active if w in self._workers and (w.job is not None or not w.ready)]:
            if now >= worker.deadline:
                if not worker.ready:
                    raise RuntimeError(_start_error(f"no sign of life in {START_TIMEOUT_S:.0f} s"))
                self.timeouts += 1
                self._drop(worker)

    def _read(self, worker: _Worker, equal: list[bool]) -> None:
        try:
            reply = worker.receive()
            if reply is None:
                return
            if worker.ready and reply.get("id") != worker.job:
                raise EOFError
        except EOFError:
            if not worker.ready:
                raise RuntimeError(_start_error(worker.last_words() or "it died at once")) from None
            self.failures += 1
            self._drop(worker)
            return
        if not worker.ready:
            if not reply.get("ready"):
                raise RuntimeError(_start_error(reply.get("error", "no reason given")))
            worker.ready = True
            return
        equal[worker.job] = reply.get("equal") is True
        worker.job = None
        if reply.get("last"):
            self.failures += 1
            self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


def _start_error(reason: str) -> str:
    return (
        f"the grader's worker ({sys.executable} -m capcur_jax.rewards.worker) can't start: {reason}. Install "
        "math-verify for this Python (pip install 'math-verify[antlr4_13_2]'); where memory is what it lacks, raise "
        "config.reward.memory_mb; or set config.reward.function to a reward of your own"
    )
