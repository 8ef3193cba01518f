"""Records of steps: whose seconds they are while the next step already runs, and what is counted once. No model."""

import contextlib
import itertools
import subprocess
import sys
import threading
import types

import pytest

from capcur_jax.records import steps
from capcur_jax.records.jsonl import JsonLines, read_jsonl
from capcur_jax.records.steps import StepRecorder

WAIT = 10


class Update:
    """A leaf of an update's metrics that is on the device until `done`."""

    def __init__(self, skipped=0, tokens=60):
        self.skipped, self.tokens, self._event = skipped, tokens, threading.Event()

    def block_until_ready(self):
        assert self._event.wait(WAIT)
        return self

    def done(self):
        self._event.set()
        return self


def combined(updates):
    assert all(update["leaf"]._event.is_set() for update in updates), "not waited for"
    leaves = [update["leaf"] for update in updates]
    return {"skipped_updates": sum(leaf.skipped for leaf in leaves), "trained_tokens": leaves[0].tokens, "loss": 0.5}


class Loop:
    """A recorder with a clock that stands until it is set, and what it told display and sinks."""

    def __init__(self, file, monkeypatch, **options):
        self.now, self.counter, self.told, self.numbers = 100.0, types.SimpleNamespace(count=5), [], itertools.count(1)
        monkeypatch.setattr(steps, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        display = types.SimpleNamespace(
            step=lambda record: self.told.append(("step", record["step"])),
            evaluation=lambda records: self.told.append(("evaluation", len(records))),
        )
        sinks = types.SimpleNamespace(write=lambda record: self.told.append(("sink", record["type"])))
        self.recorder = StepRecorder(file, combined, self.counter, display, **{"sinks": sinks, **options})

    def put(self, update, dispatched, before=0, starts=None, **seconds):
        timer = types.SimpleNamespace(seconds=seconds, starts=starts or {})
        record = {"type": "step", "step": next(self.numbers)}
        self.recorder.put(record, [{"leaf": update}], before, timer, dispatched)
        return record

    def finish(self, update, at):
        """The update is done at that moment, and its record is completed."""
        self.now = at
        update.done()
        self.recorder._pending.done.result(WAIT)


@pytest.fixture
def loop(tmp_path, monkeypatch):
    loop = Loop(tmp_path / "metrics.jsonl", monkeypatch)
    with loop.recorder:
        yield loop


def test_a_step_has_its_own_seconds_though_the_next_one_runs_beside_it(loop, tmp_path):
    first, second, third = Update(), Update(tokens=90), Update()
    loop.put(first, 103.0, starts={"rollout": 100.0}, rollout=2.0, pack=0.5)
    assert not loop.recorder.steps and read_jsonl(tmp_path / "metrics.jsonl") == []  # nothing waits for the devices
    loop.finish(first, 107.0)
    # The second step's rollouts began at 104 and waited 3 s for the first one's update.
    loop.put(second, 111.0, starts={"rollout": 104.0}, rollout=6.0)
    loop.finish(second, 115.0)
    loop.put(third, 119.0, starts={"rollout": 116.0}, rollout=2.0)  # after the update: it waited for nothing
    loop.finish(third, 120.0)
    loop.recorder.complete()
    loop.recorder.complete()  # once
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    keys = ("seconds", "seconds_rollout", "seconds_update", "tokens_per_second")
    assert [tuple(record[key] for key in keys) for record in records] == [
        (7.0, 2.0, 4.0, pytest.approx(60 / 7)),
        (8.0, 3.0, 4.0, pytest.approx(90 / 8)),
        (5.0, 2.0, 1.0, pytest.approx(60 / 5)),
    ]
    assert records[0]["seconds_pack"] == 0.5 and records[0]["loss"] == 0.5 and records[0]["host_rss_gib"] > 0
    assert loop.recorder.steps == records
    assert loop.told == [(kind, what) for step in (1, 2, 3) for kind, what in (("sink", "step"), ("step", step))]


def test_a_step_without_rollouts_has_none(loop):
    update = Update()
    loop.put(update, 101.0, data=0.5)
    loop.finish(update, 102.0)
    loop.recorder.complete()
    (record,) = loop.recorder.steps
    assert {key: record[key] for key in record if key.startswith("seconds")} == {
        "seconds": 2.0, "seconds_data": 0.5, "seconds_update": 1.0,
    }  # fmt: skip


def test_what_lies_between_steps_is_told_once_and_is_no_training_time(loop):
    first, second, third = Update(), Update(), Update()
    loop.put(first, 101.0)
    loop.finish(first, 102.0)
    loop.recorder.complete()
    for _ in range(2):  # in parts; and one that is ended by an error
        with contextlib.suppress(InterruptedError), loop.recorder.between("seconds_validation"):
            loop.now += 4.0
            raise InterruptedError
    loop.put(second, 111.0)
    loop.finish(second, 112.0)
    loop.put(third, 113.0)
    loop.finish(third, 115.0)
    loop.recorder.complete()
    records = loop.recorder.steps
    assert [record.get("seconds_validation") for record in records] == [None, 8.0, None]
    assert [record["seconds"] for record in records] == [2.0, 10.0, 3.0]
    assert [record["tokens_per_second"] for record in records] == [30.0, 30.0, 20.0]


def test_a_stage_s_start_is_no_part_of_its_first_step(loop):
    loop.now, loop.counter.count = 150.0, 25
    loop.recorder.begin_stage()
    updates = [Update() for _ in range(3)]
    for number, update in enumerate(updates):
        loop.counter.count += number  # programs that were made since the last step
        loop.put(update, 151.0 + number)
        loop.finish(update, 152.0 + number)
    loop.recorder.complete()
    assert [record["compilations"] for record in loop.recorder.steps] == [0, 1, 2]
    assert [record["seconds"] for record in loop.recorder.steps] == [2.0, 1.0, 1.0]


def test_skipped_updates_are_those_of_the_whole_run(loop):
    assert loop.recorder.skipped == 0
    for at, (skipped, before) in enumerate([(1, 0), (2, 0), (1, 2)]):  # a state counts those of its stage
        update = Update(skipped)
        loop.put(update, 101.0 + at, before)
        loop.finish(update, 102.0 + at)
        loop.recorder.complete()
        assert loop.recorder.skipped == (1, 2, 3)[at]


def test_idle_steps_are_those_in_a_row_that_left_every_update_out(loop):
    told = []
    for at, skipped in enumerate([1, 2, 2, 3, 4]):
        update = Update(skipped)
        loop.put(update, 101.0 + at)
        loop.finish(update, 102.0 + at)
        loop.recorder.complete()
        told.append(loop.recorder.idle)
    assert told == [1, 2, 0, 1, 2]
    loop.recorder.begin_stage()
    assert loop.recorder.idle == 0


def test_evaluations_are_written_shown_and_kept(loop, tmp_path):
    both = [{"type": "evaluation", "capability": name, "accuracy": 0.5} for name in ("a", "b")]
    loop.recorder.evaluation(both, 3.0)
    loop.recorder.evaluation(both[:1], 4.0)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert records == [
        {**both[0], "seconds_all": 3.0},
        {**both[1], "seconds_all": 3.0},
        {**both[0], "seconds_all": 4.0},
    ]
    assert [record["capability"] for record in loop.recorder.evaluations] == ["a", "b", "a"]
    assert loop.told == [("sink", "evaluation")] * 2 + [("evaluation", 2), ("sink", "evaluation"), ("evaluation", 1)]


def test_a_run_that_goes_on_knows_its_records(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    earlier = [
        {"type": "evaluation", "capability": "a"}, {"type": "step", "step": 1, "skipped_updates": 0},
        {"type": "validation", "accuracy": 1.0}, {"type": "step", "step": 2, "skipped_updates": 3},
    ]  # fmt: skip
    with JsonLines(file) as lines:
        for record in earlier:
            lines.write(record)
    loop = Loop(file, monkeypatch)
    with loop.recorder:
        assert loop.recorder.steps == [earlier[1], earlier[3]] and loop.recorder.skipped == 3
        assert loop.recorder.evaluations == [earlier[0]] and not loop.told
        loop.recorder.write({"type": "validation", "accuracy": 0.5})
    assert read_jsonl(file) == [*earlier, {"type": "validation", "accuracy": 0.5}]


def test_processes_that_own_no_file_keep_what_they_need(tmp_path, monkeypatch):
    loop, update = Loop(tmp_path / "metrics.jsonl", monkeypatch, owner=False, sinks=None), Update(skipped=1)
    with loop.recorder:
        loop.put(update, 101.0)
        loop.finish(update, 102.0)
        loop.recorder.complete()
        loop.recorder.evaluation([{"type": "evaluation", "capability": "a"}], 1.0)
        assert loop.recorder.skipped == 1 and len(loop.recorder.evaluations) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_went_wrong_in_an_update_ends_its_step(loop, monkeypatch):
    def wrong(updates):
        raise ArithmeticError("out of memory")

    monkeypatch.setattr(steps.jax, "block_until_ready", wrong)
    update = Update()
    loop.put(update.done(), 101.0)
    with pytest.raises(ArithmeticError, match="out of memory"):
        loop.recorder.complete()
    assert not loop.recorder.steps


def test_a_process_does_not_wait_at_its_end_for_an_update_that_hangs(tmp_path):
    code = f"""if True:
        import threading, types
        from capcur_jax.records import steps
        steps.jax.block_until_ready = lambda updates: threading.Event().wait()
        counter = types.SimpleNamespace(count=0)
        recorder = steps.StepRecorder(steps.Path({str(tmp_path / "metrics.jsonl")!r}), None, counter, None)
        with recorder:
            recorder.put({{}}, [{{}}], 0, None, 0.0)
            raise KeyboardInterrupt
    """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt"), ended.stderr


def test_closing_waits_for_no_update_and_leaves_no_thread(tmp_path, monkeypatch):
    loop, update = Loop(tmp_path / "metrics.jsonl", monkeypatch), Update()
    with loop.recorder:
        loop.put(update, 101.0)
    update.done()
    with pytest.raises(ValueError, match="closed file"):
        loop.recorder.write({"type": "validation"})
    for thread in threading.enumerate():
        if thread.name.startswith("update"):
            thread.join(WAIT)
            assert not thread.is_alive()


def test_an_alarm_is_in_the_record_and_told(loop, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(loop.recorder, "_alarmed", lambda *alarm: told.append(alarm))
    for number in range(22):
        update = Update()
        loop.put(update, 103.0)
        loop.recorder._pending.record["equal_groups"] = 0.9
        loop.finish(update, 107.0 + number)
    loop.recorder.complete()
    (record,) = [record for record in read_jsonl(tmp_path / "metrics.jsonl") if "alarms" in record]
    assert record["step"] == 20 and told == list(record["alarms"].items())
    assert told[0][0] == "equal_groups" and "90%" in told[0][1]
