"""A reward function of the user's own: in worker processes that can be killed, or, where it asks for that, in this one.

`Function` is the trainer's side, `answers` what a worker (function_worker.py) and the trainer do alike: the function is
called, and what it returns is read.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import json
import math
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from capcur_jax.data.problem import Problem
from capcur_jax.workers import Died, Pool, TimedOut

RewardFunction = Callable[..., Any]  # (Problem, response) -> result, or of lists where it is `batched`

_LATE_IN_A_ROW = 3  # calls; then what is left of a failed batch is not asked
_LARGEST = 1e18  # of a reward: advantages are float32, and the squares of their spread overflow there from 1e19 on
_OF_MEMORY = ("exit status 3", "ended by signal")  # how a worker ends that lacks it: function_worker.py, the system
_LEAST = {"workers": 1, "timeout_s": 0.1, "memory_mb": 16}
# A worker sees no accelerator: the trainer has them.
_NO_DEVICES = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


class Outcome(NamedTuple):
    """What came of one response."""

    values: dict[str, float] | None  # reward, and accuracy and format where the function gave them; None: it failed
    error: str = ""  # what went wrong, with the traceback
    timed_out: bool = False


class Function:
    """Calls the function that `spec` ("module:function") names, for any number of responses at a time.

    It runs in `workers` processes of its own. The first is started here, the others when a response needs one. They
    import the module again, and have the trainer's environment and sys.path, but no accelerator. Attributes of the
    function decide more:

        score.batched = True     # called with lists, of problems and of responses; gives a list of results
        score.in_process = True  # called in the trainer's process, without a time-out: it needs its state, or a device

    Args:
      timeout_s: wall-clock seconds for one call. A call that takes longer is ended with its process. One of a batch is
        then repeated response by response, as where it raises, so that one response costs no other its verdict. After
        three in a row that take too long the function hangs, not a response: the rest is marked timed out, unasked.
      memory_mb: address space in MiB that calls may take in a worker, beyond what importing the module took.

    Attributes:
      timeouts, failures: responses whose worker was ended because its time was over, or ended by itself.
      repeated: calls of a batch that failed, and were repeated response by response.

    Raises:
      ValueError: the function can't be imported, here or in a worker, or a setting is out of range.
    """

    def __init__(self, spec: str, workers: int = 2, timeout_s: float = 5.0, memory_mb: int = 1024):
        self.spec, self.timeouts, self.failures, self.repeated = spec, 0, 0, 0
        self._function = load(spec)
        self._here = bool(getattr(self._function, "in_process", False))
        self._batched = bool(getattr(self._function, "batched", False))
        for name, value in (("workers", workers), ("timeout_s", timeout_s), ("memory_mb", memory_mb)):
            if not _LEAST[name] <= value < float("inf"):
                raise ValueError(f"config.reward.{name} is {value}; set it to {_LEAST[name]} or more")
        self._count, self._settings = 1 if self._here else int(workers), (int(memory_mb), float(timeout_s))
        self._counting = threading.Lock()
        self._renew()
        if not self._here:
            try:
                self._pool.start()  # what a worker lacks shows before a model is opened
            except RuntimeError as error:
                raise ValueError(str(error)) from None

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Outcome]:
        """The outcome of each response, in the order given.

        Raises:
          RuntimeError: a worker can't be started.
        """
        asked = list(zip(problems, responses, strict=True))
        size = -(-len(asked) // self._count) if self._batched else 1
        parts = [asked[at : at + size] for at in range(0, len(asked), size)] if asked else []
        if self._here:  # in the thread that asks: what the function needs may belong to it
            return [outcome for part in parts for outcome in self._part(part)]
        with concurrent.futures.ThreadPoolExecutor(self._count, "reward") as threads:
            try:
                return [outcome for found in threads.map(self._part, parts) for outcome in found]
            except RuntimeError:  # no worker can be started: other calls' threads find that out themselves
                raise
            except BaseException:  # an interrupt: nobody waits for what is asked still
                self.close()
                threads.shutdown(cancel_futures=True)
                raise

    @property
    def parallel(self) -> int:
        """Calls that keep all workers busy, from threads of the caller's; 0: a batch is to come as one call, from the
        thread that made this."""
        return 0 if self._here or self._batched else self._count

    def close(self) -> None:
        """Ends the workers. Another call starts new ones."""
        with self._counting:
            self._end()
            self._renew()

    def _renew(self) -> None:
        self._pool = Pool(
            self._count,
            "capcur_jax.rewards.function_worker",
            *self._settings,
            name=f"a worker for config.reward.function {self.spec}",
            remedy="It imports the module anew, with the trainer's environment and sys.path; a function that has to "
            "run in the trainer's process says so by its attribute in_process = True (docs/rewards.md)",
            arguments=(self.spec,),
            environment=_environment(),
        )
        self._end = weakref.finalize(self, self._pool.close)  # also runs at exit

    def _part(self, asked: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        """The outcomes of one call; of each response in a call of its own where that one fails."""
        try:
            return self._call(asked)
        except _CallFailed as failure:
            if len(asked) > 1:
                with self._counting:
                    self.repeated += 1
                    first = self.repeated == 1
                if first:
                    logging.warning(
                        "config.reward.function %s failed for a batch of %d responses, which are asked one by one now. "
                        "Later batches that fail are only counted (reward_batches_repeated). %s",
                        self.spec, len(asked), failure.outcome.error,
                    )  # fmt: skip
                return self._singly(asked)
            with self._counting:
                self.timeouts += failure.outcome.timed_out
                self.failures += failure.lost
            return [failure.outcome]

    def _singly(self, asked: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        """The outcomes of a batch that failed, of each response in a call of its own; bounded in time."""
        outcomes: list[Outcome] = []
        late = 0
        for one in asked:
            if late == _LATE_IN_A_ROW:
                break
            outcomes += self._part([one])
            late = late + 1 if outcomes[-1].timed_out else 0
        rest = len(asked) - len(outcomes)
        said = f"not asked: the batch and then {late} calls in a row took longer than config.reward.timeout_s"
        with self._counting:
            self.timeouts += rest
        return outcomes + [Outcome(None, said, timed_out=True)] * rest

    def _call(self, asked: Sequence[tuple[Problem, str]]) -> list[Outcome]:
        problems, responses = map(list, zip(*asked, strict=True))
        if self._here:
            return _read(answers(self._function, problems, responses))
        timeout_s, memory_mb = self._settings[1], self._settings[0]
        try:
            request = {"problems": [to_json(problem) for problem in problems], "responses": responses}
            _, payload = self._pool.ask(request)
        except TimedOut:
            said = f"it took longer than config.reward.timeout_s = {timeout_s:g} s"
            raise _CallFailed(Outcome(None, said, timed_out=True)) from None
        except Died as error:
            said = f"its worker {error}"
            if said.startswith(tuple(f"its worker {way}" for way in _OF_MEMORY)):
                said += f" (calls may take config.reward.memory_mb = {memory_mb} MiB)"
            raise _CallFailed(Outcome(None, said), lost=True) from None
        return _read(json.loads(payload))


class _CallFailed(Exception):
    """No response of a call has a result. `lost`: its worker ended."""

    def __init__(self, outcome: Outcome, lost: bool = False):
        super().__init__(outcome.error)
        self.outcome, self.lost = outcome, lost


def _read(answered: list[dict[str, Any]] | str) -> list[Outcome]:
    """What `answers` gave. Raises _CallFailed."""
    if isinstance(answered, str):
        raise _CallFailed(Outcome(None, answered))
    return [Outcome(None, found["error"]) if "error" in found else Outcome(found) for found in answered]


def _environment() -> dict[str, str]:
    """Of a worker: the function is the user's, so it gets what the trainer was started with."""
    path = [os.path.abspath(entry) for entry in sys.path]  # "" is the folder that the trainer runs in
    return dict(os.environ) | _NO_DEVICES | {"PYTHONPATH": os.pathsep.join(path)}


# ---------------------------------------------------------------------- in a worker, and in the trainer


def load(spec: str) -> RewardFunction:
    """The function that "module:function" names. Raises ValueError."""

    def problem_with(what: str) -> ValueError:
        return ValueError(f"config.reward.function is {spec!r}: {what}")

    module_name, colon, attribute = spec.partition(":")
    if not (colon and module_name and attribute):
        raise problem_with('write it as "module:function", for example "my_rewards:score"')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs here, and may raise anything
        raise problem_with(
            f"importing {module_name} failed ({type(error).__name__}: {error}); give the dotted name of a module, and "
            "add the folder that holds it to PYTHONPATH"
        ) from error
    except SystemExit as error:
        raise problem_with(
            f"importing {module_name} ended the program (SystemExit: {error}); what reads the command line or exits "
            'belongs below if __name__ == "__main__"'
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise problem_with(
            f"{module_name} ({getattr(module, '__file__', 'built in')}) has no {attribute}; define it there"
        )
    if not callable(function):
        raise problem_with(f"it is a {type(function).__name__}; name a function of (problem, response)")
    return function


def answers(
    function: RewardFunction, problems: Sequence[Problem], responses: Sequence[str]
) -> list[dict[str, Any]] | str:
    """The result of each response as `result` reads it, or {"error": text}; a text where the call itself failed."""
    try:
        if getattr(function, "batched", False):
            found = list(function(problems, responses))
            if len(found) != len(responses):
                raise ValueError(f"{len(found)} results for {len(responses)} responses: return one for each")
        else:
            found = [function(problem, response) for problem, response in zip(problems, responses, strict=True)]
    except MemoryError:  # a fresh process is the only clean state: not for the trainer's, where it ends the run
        raise
    except (Exception, SystemExit):  # one odd response must not end a run of hours
        return traceback.format_exc(limit=-8)[-4000:].strip()
    return [_result(one) for one in found]


def _result(found: Any) -> dict[str, Any]:
    try:
        return result(found)
    except Exception as error:  # a number of the user's own kind may raise anything
        return {"error": f"{type(error).__name__}: {error}"}


def result(found: Any) -> dict[str, float]:
    """The numbers in what the user's function returned: `reward`, and `accuracy` and `format` where they are given.
    Raises TypeError or ValueError, or what the numbers raise."""
    values = found if isinstance(found, dict) else {"reward": found}
    unknown = values.keys() - {"reward", "accuracy", "format"}
    if "reward" not in values or unknown:
        raise ValueError(f"the keys are {list(values)}; return reward and, if you like, accuracy and format")
    return {key: _number(key, value) for key, value in values.items()}


def _number(key: str, value: Any) -> float:
    if not hasattr(type(value), "__float__"):  # text has none, numbers of numpy, jax and torch do
        raise TypeError(f"{key} is a {type(value).__name__}; return a number")
    number = float(value)
    if not abs(number) <= _LARGEST:
        raise ValueError(f"{key} is {number}; return a finite number, of {_LARGEST:g} at most")
    if key != "reward" and math.isnan(number := share(number)):
        raise ValueError(f"{key} is {float(value)}; return a share, from 0 to 1")
    return number


def share(number: float) -> float:
    """The number where it is from 0 to 1, give or take its rounding; else NaN."""
    nearest = min(max(number, 0.0), 1.0)
    return nearest if abs(number - nearest) <= 1e-6 else math.nan


def to_json(problem: Problem) -> dict[str, Any]:
    """The problem's fields as JSON's types."""
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}


def from_json(fields: Mapping[str, Any]) -> Problem:
    """The problem that `to_json` gave."""
    return Problem(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
