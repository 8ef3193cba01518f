"""Compare predicted answers with gold ones: cheap rules in this process, math-verify in processes that can be killed.

Predictions are untrusted. What is decided here works on at most `MAX_LENGTH` characters with linear rules and exact
fractions of bounded size; sympy, which hangs on `9^{9^{9^9}}`, only ever sees a prediction in a worker (`worker.py`).
"""

import concurrent.futures
import importlib.util
import threading
import weakref
from collections.abc import Sequence

from capcur_jax.data import answers
from capcur_jax.workers import Died, Pool, TimedOut

MAX_LENGTH = 512  # characters; a longer prediction is wrong outright
_LEAST = {"workers": 1, "timeout_s": 0.1, "memory_mb": 128}
_NAME = "the grader's worker"
_REMEDY = (
    "Install math-verify for this Python (pip install 'math-verify[antlr4_13_2]'); where memory is what it lacks, "
    "raise config.reward.memory_mb; or set config.reward.function to a reward of your own"
)


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
    3. A gold number needs a finished number: `x = 5` and "5 cm" do, `2+3`, `5!`, `\sqrt{25}` and, for a gold integer,
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


# ---------------------------------------------------------------- comparing in workers


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
            raise RuntimeError(f"{_NAME} can't start: the package math_verify is not installed. {_REMEDY}")
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

    def _renew(self) -> None:
        """A pool that starts workers when they are needed."""
        self._pool = Pool(self._count, "capcur_jax.rewards.worker", *self._settings, name=_NAME, remedy=_REMEDY)
        self._end = weakref.finalize(self, self._pool.close)  # also runs at exit

    def _compare(self, jobs: list[tuple[str, str]]) -> list[bool]:
        """Compares all jobs, one in flight for each worker."""
        equal = []
        with concurrent.futures.ThreadPoolExecutor(min(self._count, len(jobs)), "grader") as threads:
            try:
                for agrees, late, lost in threads.map(self._judge, jobs):
                    equal.append(agrees)
                    self.timeouts += late
                    self.failures += lost
            except BaseException:  # an interrupt too: what is asked still must not answer the next call
                self._end()
                threads.shutdown(cancel_futures=True)
                self._renew()
                raise
        return equal

    def _judge(self, job: tuple[str, str]) -> tuple[bool, int, int]:
        """Whether a pair agrees, and the workers that it cost: killed, and lost otherwise."""
        predicted, gold = job
        try:
            reply, _ = self._pool.ask({"gold": gold, "predicted": predicted})
        except TimedOut:
            return False, 1, 0
        except Died:
            return False, 0, 1
        return reply.get("equal") is True, 0, reply.get("last") is True
