"""The order in which jobs run, what is tried again, and what is told, with an executor that only pretends."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path

import pytest

from capcur_jax.grid import runner
from capcur_jax.grid.jobs import Job
from capcur_jax.interruption import Interrupted


class Pretended:
    """Commands end after one look with the next of their exit codes; `most`: that ran side by side."""

    def __init__(self, codes, width=2, says="words\n"):
        self.codes, self.width, self.says, self.started, self.running, self.most = codes, width, says, [], 0, 0
        self.stopped, self.batches = [], []

    @contextlib.contextmanager
    def together(self):
        before = len(self.started)
        yield
        self.batches.append(self.started[before:])

    def start(self, command, log):
        name, executor = command[-1], self
        self.started.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(self.says)
        code, looks, ended = self.codes[name].pop(0) if self.codes.get(name) else 0, [None], []

        def poll():
            if looks:
                return looks.pop()
            if code == "never" and name not in executor.stopped:
                return None
            if not ended:
                executor.running -= 1
                ended.append(130 if code == "never" else code)
            return ended[0]

        return types.SimpleNamespace(poll=poll, stop=lambda: self.stopped.append(name), kill=lambda: None)


class Board:
    def __init__(self):
        self.shown = []

    def show(self, lines):
        self.shown.append({line.name: line.state for line in lines})


def job(name, tmp_path, *needs):
    return Job(name, (name,), Path(tmp_path) / name, needs)


def run(tmp_path, jobs, codes, **kinds):
    executor, board = Pretended(codes, **kinds), Board()
    interruption = types.SimpleNamespace(check=lambda: None)
    states = runner.run([job(*one) for one in jobs], [], executor, board, interruption)
    return {state.job.name: (state.state, state.tries) for state in states}, executor, board, states


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(runner, "POLL_S", 0.0)
    monkeypatch.setattr(runner, "LOOK_S", 0.0)


def test_so_many_run_side_by_side_in_their_order(tmp_path):
    ends, executor, board, _ = run(tmp_path, [(name, tmp_path) for name in "abcde"], {}, width=2)
    assert set(ends.values()) == {("done", 1)} and executor.most == 2 and executor.started == list("abcde")
    assert executor.batches[0] == ["a", "b"]  # what may start at once is one array of a cluster
    assert board.shown[0]["a"] == "running" and set(board.shown[-1].values()) == {"done"}


def test_what_died_is_tried_again_and_no_more_than_so_often(tmp_path):
    codes = {"a": [-9, 1, 0], "b": [-9] * 9}
    ends, executor, _, states = run(tmp_path, [("a", tmp_path), ("b", tmp_path), ("c", tmp_path)], codes)
    assert ends == {"a": ("done", 3), "b": ("failed", runner.TRIES), "c": ("done", 1)}
    assert executor.started.count("b") == runner.TRIES and states[1].note == "signal 9"


@pytest.mark.parametrize(
    ("says", "tries"),
    [
        ("plan\nerror: config.checkpoint: /nowhere\n  - more\n", 1),
        ("error: no server is left\nthe same command with --workdir=a goes on\n", runner.TRIES),
        ("Traceback (most recent call last):\nValueError: x\n", runner.TRIES),
    ],
)
def test_a_refused_command_is_not_tried_again(tmp_path, says, tries):
    ends, _, _, (state,) = run(tmp_path, [("a", tmp_path)], {"a": [1] * 9}, says=says)
    assert ends == {"a": ("failed", tries)} and state.note == f"exit code 1: {says.splitlines()[-1]}"


def test_what_needs_another_waits_for_it_and_fails_with_it(tmp_path):
    jobs = [("run", tmp_path, "rates"), ("other", tmp_path), ("rates", tmp_path), ("lost", tmp_path, "broken")]
    jobs += [("broken", tmp_path), ("free", tmp_path, "done before")]
    ends, executor, _, states = run(tmp_path, jobs, {"broken": [-9] * 9}, width=1)
    assert executor.started.index("rates") < executor.started.index("run")
    assert ends["lost"] == ("failed", 0) and states[3].note == f"needs broken ({states[4].job.log})"
    assert ends["run"] == ends["other"] == ends["free"] == ("done", 1)


def test_what_can_t_be_started_fails_and_the_others_go_on(tmp_path):
    (tmp_path / "a").write_text("no folder")
    ends, _, _, (state, _) = run(tmp_path, [("a", tmp_path), ("b", tmp_path)], {})
    assert ends == {"a": ("failed", 1), "b": ("done", 1)} and state.note.startswith("can't be started: ")


def test_a_signal_stops_what_runs(tmp_path):
    executor, seen = Pretended({"a": ["never"], "b": ["never"]}), []

    def check():
        seen.append(1)
        if len(seen) == 5:
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        jobs = [job(name, tmp_path) for name in "abc"]
        runner.run(jobs, [], executor, Board(), types.SimpleNamespace(check=check))
    assert executor.stopped == ["a", "b"] and executor.running == 0 and executor.started == ["a", "b"]
