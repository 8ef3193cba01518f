"""Grade predicted answers: `compare` decides by the gold answer's kind, formulas go to processes that can be killed.

sympy, which hangs on `9^{9^{9^9}}`, only ever sees a prediction in a worker (`worker.py`).
"""

import concurrent.futures
import importlib.util
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from capcur_jax.answers.kinds import Gold
from capcur_jax.rewards.compare import Job, Verdict, decide
from capcur_jax.workers import Died, Pool, TimedOut

_LEAST = {"workers": 1, "timeout_s": 0.1, "memory_mb": 128}
_NAME = "the grader's worker"
_REMEDY = (
    "Install the parser for this Python (pip install 'latex2sympy2_extended[antlr4_13_2]'); where memory is what it "
    "lacks, raise config.reward.memory_mb; or set config.reward.function to a reward of your own"
)


class Judgement(NamedTuple):
    """Whether an answer is right, and whether it counts as wrong only because the comparison took too long."""

    correct: bool
    timed_out: bool = False


class Grader:
    """Grades answers; safe to call from several threads, which share the workers: a pair that hangs keeps one of them.

    Args:
      workers: processes that compare formulas, started when the first pair needs one.
      timeout_s: wall-clock seconds for one pair.
      memory_mb: address space of one worker in MiB.

    `timeouts` counts pairs whose worker had to be killed, `failures` those whose worker died or took most of its
    memory. The worker is replaced, and a pair without a verdict is wrong.

    Raises:
      RuntimeError: the parser of formulas is not installed.
      ValueError: a setting is out of range.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_mb: int = 1024):
        for name, value in (("workers", workers), ("timeout_s", timeout_s), ("memory_mb", memory_mb)):
            least = _LEAST[name]
            if not least <= value < float("inf"):
                raise ValueError(f"config.reward.{name} is {value}; set it to {least} or more")
        if importlib.util.find_spec("latex2sympy2_extended") is None:
            raise RuntimeError(f"{_NAME} can't start: the package latex2sympy2_extended is not installed. {_REMEDY}")
        self.timeouts = 0
        self.failures = 0
        self._count = int(workers)
        self._settings = int(memory_mb), float(timeout_s)
        self._lock = threading.Lock()
        self._renew()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. Grading again starts new ones."""
        with self._lock:
            self._end()
            self._renew()

    @property
    def parallel(self) -> int:
        """Calls that keep all workers busy."""
        return self._count

    def grade(self, pairs: Sequence[tuple[str | None, str | Gold]]) -> list[bool]:
        """Whether each (predicted, gold) agrees, in the order given. Raises as `judge`.

        A gold that comes as bare text is classified here, without its question.
        """
        return [verdict.correct for verdict in self.judge(pairs)]

    def judge(self, pairs: Sequence[tuple[str | None, str | Gold]]) -> list[Judgement]:
        """The judgement of each (predicted, gold), in the order given; `compare.decide` has the rules.

        Equal pairs are compared once: the samples of a group often agree.

        Raises:
          RuntimeError: a worker can't be started.
        """
        verdicts = [self._decide(predicted, gold) for predicted, gold in pairs]
        jobs = list(dict.fromkeys(
            job for verdict in verdicts if isinstance(verdict, list) for one in verdict for job in one
        ))  # fmt: skip
        compared: dict[Job, Judgement] = {}
        if jobs:
            compared = dict(zip(jobs, self._compare(jobs), strict=True))
        return [_joined(verdict, compared) for verdict in verdicts]

    def _decide(self, predicted: str | None, gold: str | Gold) -> Verdict:
        """`decide`; what it can't take is wrong and counted, so that one odd answer does not end a run."""
        try:
            return decide(predicted, gold)
        except Exception:
            with self._lock:
                self.failures += 1
            return False

    def _renew(self) -> None:
        """A pool that starts workers when they are needed."""
        self._pool = Pool(self._count, "capcur_jax.rewards.worker", *self._settings, name=_NAME, remedy=_REMEDY)
        self._end = weakref.finalize(self, self._pool.close)  # also runs at exit

    def _compare(self, jobs: list[Job]) -> list[Judgement]:
        """Compares all jobs, one in flight for each worker."""
        with concurrent.futures.ThreadPoolExecutor(min(self._count, len(jobs)), "grader") as threads:
            try:
                found = list(threads.map(self._ask, jobs))
            except RuntimeError:  # no worker can be started: other calls' threads find that out themselves
                raise
            except BaseException:  # an interrupt: nobody waits for what is asked still
                self.close()
                threads.shutdown(cancel_futures=True)
                raise
        with self._lock:
            self.timeouts += sum(judgement.timed_out for judgement, _ in found)
            self.failures += sum(lost for _, lost in found)
        return [judgement for judgement, _ in found]

    def _ask(self, job: Job) -> tuple[Judgement, int]:
        """The judgement of a pair, and the workers that it cost other than by time."""
        predicted, gold = job
        try:
            reply, _ = self._pool.ask({"gold": gold, "predicted": predicted})
        except TimedOut:
            return Judgement(False, True), 0
        except Died:
            return Judgement(False), 1
        return Judgement(reply.get("equal") is True), reply.get("last") is True


def _joined(verdict: Verdict, compared: dict[Job, Judgement]) -> Judgement:
    """Right if all comparisons of one alternative are; timed out if it is wrong and one of them had no time."""
    if isinstance(verdict, bool):
        return Judgement(verdict)
    if any(all(compared[job].correct for job in one) for one in verdict):
        return Judgement(True)
    return Judgement(False, any(compared[job].timed_out for one in verdict for job in one))
