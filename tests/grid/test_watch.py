"""What the records of a run say of it, and how the table of all runs looks on a terminal and in a log."""

from __future__ import annotations

import io
import json

from rich.console import Console

from capcur_jax.grid import watch
from capcur_jax.grid.watch import Board, Line, Progress
from capcur_jax.records.jsonl import JsonLines


def write(folder, records):
    lines = JsonLines(folder / "metrics.jsonl")
    for record in records:
        lines.write(record)
    lines.close()


def step(number, accuracy=0.5, seconds=2.0, **more):
    return {"type": "step", "step": number, "stage": "text", "seconds": seconds, "accuracy": accuracy, **more}


def test_nothing_yet(tmp_path):
    assert watch.progress(tmp_path / "nowhere", 10) == Progress()
    (tmp_path / "metrics.jsonl").write_text('{"type": "st')
    (tmp_path / "summary.json").write_text("[]")
    assert watch.progress(tmp_path, 10) == Progress()


def test_a_run_is_as_far_as_its_records(tmp_path):
    write(tmp_path, [step(1, seconds=90.0, compilations=3), *(step(n, n / 100) for n in range(2, 31))])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step", "step": 31')  # is being written
    found = watch.progress(tmp_path, 50)
    assert (found.step, found.stage, found.left) == (30, "text", 40.0)
    assert found.accuracy == "20.5% sampled"  # of the last 20
    assert watch.progress(tmp_path, 0).left is None


def test_the_records_of_a_long_run_are_read_from_their_end(tmp_path):
    write(tmp_path, [step(n, text="x" * 100) for n in range(1, 2001)])
    assert (tmp_path / "metrics.jsonl").stat().st_size > 2 * watch.TAIL
    assert watch.progress(tmp_path, 3000).step == 2000


def test_of_a_finished_run_the_held_out_accuracy_is_shown(tmp_path):
    accuracy = {"perception": {"base": 0.5, "final": 0.885}, "text": {"final": None}}
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished", "steps": 9, "accuracy": accuracy}))
    assert watch.progress(tmp_path, 9) == Progress(9, "", None, "88.5 / -")


def text_of(board):
    with board.console.capture() as shown:
        board.console.print(board.rendered())
    return shown.get()


def test_running_and_failed_runs_come_first_where_not_all_fit():
    board = Board(Console(file=io.StringIO(), width=100, height=12))
    found = [Line(f"staged seed {n}", "done", 9, Progress(9)) for n in range(20)]
    found += [Line("merged seed 0", "running", 900, Progress(450, "merged", 61.0, "50.0% sampled"))]
    found += [
        Line("merged seed 1", "failed", 9, Progress(), "signal 9"),
        Line("visual seed 0", "waiting", 9, Progress()),
    ]
    board.show(found)
    lines = [line.rstrip() for line in text_of(board).splitlines()]
    assert lines[2].split() == ["merged", "seed", "0", "running", "450/900", "merged", "1:01", "50.0%", "sampled"]
    assert lines[3].split()[:4] == ["merged", "seed", "1", "failed"] and lines[3].endswith("signal 9")
    assert lines[4].startswith("staged seed 19") and len(lines) == 10
    assert lines[-1].startswith("20 done, 1 running, 1 waiting, 1 failed, 0:00") and lines[-1].endswith("16 not shown")


def test_without_a_terminal_each_change_is_a_line():
    out = io.StringIO()
    with Board(Console(file=out, width=60)) as board:
        a, b = Line("a", "running", 9, Progress()), Line("b", "waiting", 9, Progress())
        board.show([a, b])
        board.show([a._replace(progress=Progress(3)), b])  # is no news for a minute
        board.show([a._replace(state="done", progress=Progress(9, "", None, "88.5")), b._replace(state="running")])
        board._said -= watch.LINE_S
        board.show([a._replace(state="done"), b._replace(state="running", progress=Progress(4, "text", 5.0, "1.0%"))])
    assert out.getvalue().splitlines() == [
        "a  running", "a  done  9/9  88.5", "b  running", "b  running  4/9 text  0:05  1.0%",
    ]  # fmt: skip
