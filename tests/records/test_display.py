"""The display: everything a record says is shown, in a log as well as on a terminal, and the terminal is left whole."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from capcur_jax.records.display import Display

RL_STEP = {
    "type": "step",
    "step": 12,
    "stage": "perception",
    "stage_step": 12,
    "objective": "grpo",
    "reward": 0.6125,
    "accuracy": 0.5813,
    "format": 0.975,
    "response_length": 31.2,
    "kl": 0.0031,
    "entropy": 0.41,
    "tokens_per_second": 2310.4,
    "seconds": 1.21,
    "seconds_rollout": 0.52,
    "seconds_reward": 0.01,
    "seconds_update": 0.63,
    "seconds_sync": 0.004,
    "compilations": 0,
    "skipped_updates": 0,
}
SUMMARY = {
    "accuracy": {
        "perception": {"base": 0.5, "after_perception": 0.75, "after_text": 0.7, "final": 0.7},
        "text": {"base": 0.4, "after_perception": 0.39, "after_text": 0.9, "final": 0.9},
    },
    "blind": {"perception": 0.27},
    "seconds": 3725.0,
    "step_seconds_median": 1.25,
    "compilations_after_warmup": 0,
    "logprob_difference_mean": 3.2e-6,
    "format_reward_final": 0.99,
    "status": "finished",
    "steps": 200,
    "checkpoint": "/runs/a rather long path that no table may fold because it is to be copied/final",
    "skipped": {"rows": 2, "images": 0},
}


def captured(width=80, total=200, **options):
    """A display that writes to a string, as into a log file."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    display = Display(console=console, **options)
    display.whole_run(total)
    return display, console.file


def evaluation(capability, accuracy, after="base", step=0):
    record = {"type": "evaluation", "step": step, "after": after, "capability": capability, "accuracy": accuracy}
    return {**record, "format": 0.97, "response_length": 21.3, "questions": 1000, "by_kind": {}}


def test_log_line_of_a_step_has_every_number_on_one_line():
    display, out = captured(width=40)
    with display:
        display.stage("perception", 100)
        display.step(RL_STEP)
    line = out.getvalue().splitlines()[-1]
    for part in (
        "step  12/200  perception  reward 0.613  accuracy 58.1%  format 98%  length 31  KL 0.0031  entropy 0.41",
        "step 1.21s  rollout 0.52s  reward 0.01s  update 0.63s  sync 0.00s  tok/s 2,310",
        "left 3:47",
    ):
        assert part in line
    assert "\x1b" not in out.getvalue(), "no escape codes in a log"


def test_log_line_of_an_sft_step():
    display, out = captured()
    record = {"step": 3, "stage": "sft", "objective": "sft", "loss": 1.5, "token_accuracy": 0.4, "seconds": 0.2}
    display.stage("sft", 10)
    display.step(record)
    assert "loss 1.5000  token accuracy 40.0%" in out.getvalue() and "KL" not in out.getvalue()


def test_log_lines_come_every_few_steps_or_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def steps_shown(seconds, **options):
        display, out = captured(total=47, **options)
        display.stage("text", 47)
        for step in range(1, 48):
            now[0] += seconds
            display.step({**RL_STEP, "step": step})
        return [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines() if line.startswith("step ")]

    assert steps_shown(0.1) == [1, 10, 20, 30, 40, 47]
    assert steps_shown(60.0) == list(range(1, 48))
    assert steps_shown(4.0, line_steps=1000) == [1, *range(4, 47, 3), 47]


def test_missing_and_null_numbers_are_shown_as_a_dash():
    display, out = captured()
    display.stage("text", 100)
    display.step({**RL_STEP, "kl": None, "reward": float("nan"), "seconds": None, "skipped_updates": 2})
    assert "reward -" in out.getvalue() and "KL -" in out.getvalue() and "skipped updates 2" in out.getvalue()
    display.evaluation([{"after": "base", "step": 0, "capability": "text", "accuracy": None}])
    display.final({"status": "interrupted", "accuracy": {"text": {"base": None}}, "seconds": None})
    display.final({})


def test_first_compiling_step_gives_no_estimate():
    display, out = captured()
    display.stage("text", 100)
    display.step({**RL_STEP, "seconds": 90.0, "compilations": 7})
    assert "left" not in out.getvalue() and "compilations 7" in out.getvalue()


def test_plan_fits_80_columns_and_takes_text_literally():
    display, out = captured()
    stages = [{"stage": name, "objective": "grpo", "rows": 3600, "steps": 100} for name in ("[bold]a", "text")]
    display.plan({"Run": {"parameters": 3280128, "work directory": "runs/[red]x", "seed": 0}, "Stages": stages})
    text = out.getvalue()
    assert "3,280,128" in text and "[bold]a" in text and "[red]x" in text and "3,600" in text
    assert max(map(len, text.splitlines())) <= 80
    display.plan({"Stages": []})


def test_evaluation_shows_points_against_the_base():
    display, out = captured()
    display.evaluation([evaluation("perception", 0.5), evaluation("text", 0.4)])
    assert "vs base" not in out.getvalue()
    display.evaluation([evaluation("perception", 0.75, "text", 100), evaluation("text", 0.38, "text", 100)])
    text = out.getvalue()
    assert "of the base (step 0)" in text and "after text (step 100)" in text
    assert "+25.0" in text and "-2.0" in text and "1,000" in text
    display.evaluation([])


def test_final_tables():
    display, out = captured()
    display.final(SUMMARY, {"report": "/runs/report.html"})
    text = out.getvalue()
    rows = [line.split() for line in text.splitlines()]
    assert ["base", "50.0", "40.0"] in rows
    assert ["after", "perception", "75.0", "+25.0", "39.0", "-1.0"] in rows
    assert ["guessing", "without", "the", "image", "27.0", "-"] in rows
    for part in ("Run finished after 200 steps", "1:02:05", "1.25 s", "3.20e-06 nats", "2 rows", "/runs/report.html"):
        assert part in text
    assert SUMMARY["checkpoint"] in text and "images" not in text


def test_the_closing_table_says_where_the_instruction_stood_if_that_is_not_one_place():
    said = {"training": "suffix", "evaluation": "system", "base": "none"}
    for given, shown in ((said, True), (dict.fromkeys(said, "suffix"), False)):
        display, out = captured()
        display.final(SUMMARY | {"instruction": given})
        assert ("training suffix, evaluation system, base none" in out.getvalue()) == shown
        assert ("instruction" in out.getvalue()) == shown


def test_a_run_that_goes_on_is_compared_with_the_base_of_its_records():
    display, out = captured()
    bases = [evaluation("perception", 0.5), evaluation("text", 0.4)]
    display.earlier([*bases, evaluation("perception", 0.6, "perception", 90)])
    assert not out.getvalue()
    display.evaluation([evaluation("perception", 0.75, "text", 100), evaluation("text", 0.38, "text", 100)])
    assert "vs base" in out.getvalue() and "+25.0" in out.getvalue() and "-2.0" in out.getvalue()


def test_best_accuracy_is_bold():
    console = Console(file=io.StringIO(), width=80, highlight=False, force_terminal=True, color_system="standard")
    Display(console=console).final(SUMMARY)
    assert "\x1b[1m75.0" in console.file.getvalue() and "\x1b[1m90.0" in console.file.getvalue()
    assert "\x1b[1m50.0" not in console.file.getvalue()


def test_progress_and_warning_without_a_terminal():
    display, out = captured(line_seconds=0.0)
    with display.progress("evaluating [text]", 100) as advance:
        advance(40)
        advance(60)
    assert "evaluating [text]: 40/100" in out.getvalue() and "evaluating [text]: 100 in 0.0 s" in out.getvalue()
    display.warn("row\x1b[2J [3]" + " long" * 40)
    assert "warning: row\\u001b[2J [3]" + " long" * 40 + "\n" in out.getvalue()


def test_quiet_shows_warnings_only():
    display, out = captured(quiet=True)
    with display, display.progress("warm-up", 2) as advance:
        display.plan({"Run": {"seed": 0}})
        display.stage("text", 100)
        advance()
        display.step({**RL_STEP, "step": 10})
        display.evaluation([evaluation("text", 0.4)])
        display.final(SUMMARY)
    assert out.getvalue() == ""
    display.warn("careful")
    assert out.getvalue() == "warning: careful\n"


_LIVE_RUN = """
import json, sys, time
from capcur_jax.records.display import Display
with Display() as display:
    display.whole_run(200, 11)  # as one that goes on
    display.stage("perception", 100)
    display.step(json.loads(sys.argv[1]))
    with display.progress("evaluating text", 100) as advance:
        advance(50)
        time.sleep(float(sys.argv[2]))
"""


def run_in_terminal(seconds, columns, interrupt=False):
    """What the program above writes to a terminal, and its exit status."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "30"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-c", _LIVE_RUN, json.dumps(RL_STEP), str(seconds)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    output, sent = b"", False
    with contextlib.suppress(OSError):  # Linux: the terminal is gone when the program ends
        while chunk := os.read(master, 65536):
            output += chunk
            if interrupt and not sent and b"evaluating" in output:
                process.send_signal(signal.SIGINT)
                sent = True
    os.close(master)
    return output.decode(), process.wait(timeout=30)


def test_a_log_has_room_for_a_path(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = "/" + 80 * "p"
    Display().plan({"Run": {"checkpoint": path, "a label of a few words": 1}})
    out = capsys.readouterr().out
    assert path in out and "a label of a few words" in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_live_bar_on_a_terminal_and_after_ctrl_c():
    output, status = run_in_terminal(0.3, 80)
    assert status == 0
    for part in ("11/200", "12/200", "reward", "0.613", "rollout", "0.52s", "evaluating text", "50/100"):
        assert part in output
    assert output.count("\x1b[?25l") == 1 and output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")

    output, status = run_in_terminal(60, 80, interrupt=True)
    assert status != 0 and "KeyboardInterrupt" in output
    shown = output.rfind("\x1b[?25h")
    assert shown > output.rfind("\x1b[?25l") and output.find("Traceback") > shown, "the bar stops before the message"


def test_metric_lines_fold_between_metrics_only():
    display, _ = captured(width=30)
    display.stage("text", 100)
    display.step(RL_STEP)
    out = Console(file=io.StringIO(), width=30)
    out.print(display._render())
    lines = [line.rstrip() for line in out.file.getvalue().splitlines()]
    assert "reward 0.613  accuracy 58.1%" in lines and all(len(line) <= 30 for line in lines)


def test_what_was_left_out_stands_beside_each_accuracy():
    display, out = captured()
    whole = {"accuracy_answered": 0.4, "left_out": 0}
    partial = {"accuracy_answered": 0.625, "left_out": 200, "questions": 800}
    display.evaluation([evaluation("text", 0.4) | whole, evaluation("visual", 0.3) | whole])
    assert "left out" not in out.getvalue()
    display.evaluation([evaluation("text", 0.4) | whole, evaluation("visual", 0.5) | partial])
    table = out.getvalue()
    assert "left out" in table and "without" in table
    (line,) = [line.split() for line in table.splitlines() if line.startswith("visual") and "200" in line]
    assert line[:6] == ["visual", "50.0%", "200", "of", "1,000", "62.5%"]
    wide = {"accuracy_answered": 0.5, "left_out": 1000, "questions": 9000}
    display.evaluation([evaluation("perception", 0.45, "perception", 90) | wide])
    display.final(
        {
            "accuracy": {"text": {"base": 0.4, "final": 0.6}, "visual": {"base": 0.3, "final": 0.5}},
            "accuracy_answered": {"text": {"base": 0.4, "final": 0.6}, "visual": {"base": 0.3, "final": 0.625}},
            "left_out": {"text": {"base": 0, "final": 0}, "visual": {"base": 0, "final": 200}},
        }
    )
    lines = out.getvalue().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("final"))
    assert lines[at].split() == ["final", "60.0", "+20.0", "50.0", "+20.0"]
    assert lines[at + 1].split() == ["answered", "alone", "(left", "out)", "62.5", "(200)"]
    assert out.getvalue().count("answered alone") == 1  # the base had all
    assert max(map(len, lines)) <= 80


def test_a_step_with_late_verdicts_says_so():
    display, out = captured()
    display.stage("text", 100)
    display.step({**RL_STEP, "timed_out": 0.0})
    assert "verdict" not in out.getvalue()
    display.stage("text", 100)
    display.step({**RL_STEP, "timed_out": 0.0125})
    assert "without a verdict in time 1.2%" in out.getvalue()
