"""Equality of answers, and that nothing a model writes hangs or harms the grader."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from capcur_jax.answers.spelling import ANSWER_LENGTH
from capcur_jax.rewards import grade

TOWER = "9^{9^{9^9}}"
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def grader():
    with grade.Grader(workers=2, timeout_s=TIMEOUT_S, memory_mb=512) as shared:
        yield shared


# (gold, predicted, equal); none of these needs a worker.
CHEAP = [
    # numbers
    ("21", "21.0", True), ("1000", "1,000", True), ("1000", r"1{,}000", True), ("5", " $5$. ", True),
    ("5", "x = 5", True), ("45", r"\angle ABC = 45^\circ", True), ("12.5", r"\$12.50", True), ("-3", "−3", True),
    ("5", "５", True), ("5", "٥", True), ("5", "6", False), ("0.3333333", "0.3333334", False),
    ("3/2", "6/4", True), (r"\frac{3}{2}", "1.5", True), ("1.5", r"1\frac{1}{2}", True), ("1/3", "0.333333", True),
    ("1/3", "0.33", False), ("300000000", r"3 \times 10^8", True), ("5", "", False), ("5", None, False),
    ("5", "five", True), ("", "5", False), ("5", "x >= 5", False), ("6", "x=5 or x=6", False),
    # percent: the number with or without the sign, or the share it is
    ("50%", "50", True), ("50", r"50\%", True), ("50%", "0.5", True), ("0.5", "50%", True), ("50%", "1/2", True),
    ("50", "0.5", False), ("50%", "5%", False),
    # arithmetic left undone is no answer
    ("5", "2+3", False), ("11", "5 6", False), ("11", r"5\quad 6", False), ("120", "5!", False), ("5", "10/2", False),
    ("5", r"\sqrt{25}", False), ("5", r"\max(5,4)", False), ("5", TOWER, False), (r"\frac{1}{2}", TOWER, False),
    # words and letters
    ("left", "Left", True), ("left", r"\text{left}.", True), ("left", "felt", False), ("no", "on", False),
    ("top-left", "top left", True), ("yes", "yes and no", False), ("B", "(B)", True), ("B", "B.", True),
    ("B", r"\text{B}", True), ("B", "b", True), ("(B)", "B", True), ("B", "（B）", True), ("B", "C", False),
    ("B", "B or C", False), ("AC", "A, C", True), ("AC", "CA", False), ("x", "-x", False),
    ("Room 12", "Moor 12", False), ("3 left", "3 felt", False),
]  # fmt: skip


@pytest.mark.parametrize("gold, predicted, equal", CHEAP)
def test_cheap_rules(gold, predicted, equal):
    assert grade.decide(predicted, gold) is equal


def test_formulas_are_compared_in_workers(grader):
    cases = [
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"\pi/2", r"\frac{\pi}{2}", True),
        ("x^2-1", "(x-1)(x+1)", True),
        ("x+1", "y+1", False),
        ("x=5", "5", True),
        ("(3, 4)", r"\left(3,4\right)", True),
        ("(3, 4)", "(4, 3)", False),
        ("1, 2", "2, 1", True),
        ("5", "5 cm", True),
        ("5 cm", "5", True),
        ("25 cm^2", "25", True),
        ("5", "5x", False),
        ("2x", "2x)(", False),
        # garbage that ends in the right thing does not count
        (r"\sqrt{2}", r"\begin{oops} 7 \sqrt{2}", False),
    ]
    verdicts = grader.grade([(predicted, gold) for gold, predicted, _ in cases])
    assert verdicts == [equal for *_, equal in cases]


def test_order_and_repeats(grader):
    right, wrong = ("1+x", "x+1"), ("x", "x+1")
    pairs = [right, wrong, ("5", "5"), wrong, right, (None, "5"), right] * 5
    assert grader.grade(pairs) == [True, False, True, False, True, False, True] * 5
    assert grader.grade([]) == []


def test_hanging_answers_are_wrong_and_the_grader_goes_on(grader):
    before = grader.timeouts
    golds = ["5", r"\frac{1}{2}", r"\pi", "x+1"]
    assert grader.grade([(TOWER, gold) for gold in golds] + [("1+x", "x+1")]) == [False] * 4 + [True]
    assert grader.timeouts - before == 2  # two of them reach a worker, once each
    assert grader.grade([(r"\sqrt{12}", r"2\sqrt{3}")]) == [True]


def test_memory_bomb():
    with grade.Grader(workers=1, timeout_s=10.0, memory_mb=128) as grader:
        assert grader.grade([("2^{3333333333}", r"\pi"), ("1+x", "x+1")]) == [False, True]
        assert grader.failures + grader.timeouts == 1


def test_code_is_not_run(grader, tmp_path):
    mark = tmp_path / "mark"
    attacks = [
        f"__import__('os').system('touch {mark}')",
        rf"\text{{__import__('os').system('touch {mark}')}}",
        f"x+1;open('{mark}','w')",
        f"$(touch {mark})",
    ]
    assert grader.grade([(attack, gold) for attack in attacks for gold in ("5", "x+1")]) == [False] * 8
    assert not mark.exists()


def test_worker_refuses_programs_and_writing(tmp_path):
    code = (
        "import os, sys; from capcur_jax.rewards import worker; worker._prepare()\n"
        "for act in (lambda: os.system('true'), lambda: open(sys.argv[1], 'w'), lambda: os.fork()):\n"
        "    try: act()\n"
        "    except PermissionError: continue\n"
        "    sys.exit('not refused')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(grade.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "mark")], env=environment, check=True)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("piece", ["9", "{", "(", "$", "\\text{", "½", "\x00", "\ud800", "٥", "-", ",000", "* "])
def test_odd_text_is_harmless(grader, piece):
    failures = grader.failures
    start = time.thread_time()  # what this thread computes: company on the machine does not stretch it
    for length in (1, 10, 100_000):
        assert grader.grade([(piece * length, gold) for gold in ("7", "B", "left", "7/2")]) == [False] * 4
    text = (piece * 512)[:ANSWER_LENGTH]  # the longest that the rules see in full
    for gold in ("7", "B", "left", "7/2", "x+1"):
        grade.decide(text, gold)
    assert time.thread_time() - start < 2.0
    assert grader.grade([("\x00", "x+1"), ("\ud800x", "x+1"), (text[:40] + "x", "x+1")]) == [False] * 3
    assert grader.failures == failures


def test_long_predictions_are_wrong():
    assert grade.decide("5" + " " * ANSWER_LENGTH, "5") is False


def test_easy_pairs_cost_little(grader):
    pairs = [(str(i % 50), str(i % 7)) for i in range(80)]
    seconds = []
    for _ in range(10):
        start = time.process_time()  # not the wall clock: the machine may be busy
        grader.grade(pairs)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.005


def test_workers_start_late_and_end():
    with grade.Grader(workers=2) as grader:
        grader.grade([("5", "5"), ("left", "felt")])
        assert not grader._pool.processes()
        grader.grade([("1+x", "x+1")])
        (pid,) = grader._pool.processes()
        grader.close()
        assert not psutil.pid_exists(pid)
        assert grader.grade([("1+x", "x+1")]) == [True]  # by another
        (pid,) = grader._pool.processes()
    assert not psutil.pid_exists(pid)


def test_an_interrupt_ends_the_workers_and_no_reply_is_left_for_the_next_call():
    with grade.Grader(workers=2, timeout_s=60.0) as grader:
        grader.grade([("1+x", "x+1"), ("2+x", "x+2")])
        pids = grader._pool.processes()
        timer = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            grader.grade([(TOWER + "x", "x+1"), (TOWER + "y", "x+1"), ("1+x", "x+1")])
        assert pids and not any(map(psutil.pid_exists, pids)) and not grader._pool.processes()
        assert grader.grade([("x", "x+1"), ("1+x", "x+1")]) == [False, True]
        assert grader.timeouts == grader.failures == 0


def test_a_pair_that_hangs_holds_up_no_other_call():
    with grade.Grader(workers=2, timeout_s=60.0) as grader:
        hanging = threading.Thread(target=lambda: grader.grade([(TOWER + "x", "x+1")]), daemon=True)
        hanging.start()
        while not grader._pool.processes():
            time.sleep(0.01)
        for i in range(3):
            assert grader.grade([(f"{i}+x", f"x+{i}")]) == [True]
        assert hanging.is_alive()
        grader.close()
        hanging.join(30)
        assert not hanging.is_alive()


def test_what_a_library_prints_is_no_reply(monkeypatch, tmp_path):
    (tmp_path / "latex2sympy2_extended").mkdir()
    (tmp_path / "latex2sympy2_extended" / "__init__.py").touch()
    (tmp_path / "latex2sympy2_extended" / "latex2sympy2.py").write_text(
        "import sympy\nNormalizationConfig = lambda **k: None\nnormalize_latex = lambda text, config: text\n"
        'def latex2sympy(*a, **k): print(\'{"id": 0, "equal": true}\', flush=True); return sympy.Symbol(a[0])\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with grade.Grader(workers=1) as grader:
        assert grader.grade([("1+x", "x+1"), ("2+x", "x+1")]) == [False, False]
        assert grader.failures == 0


def test_start_failure_names_the_remedy(monkeypatch, tmp_path):
    (tmp_path / "latex2sympy2_extended.py").write_text("raise ImportError('broken for the test')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with grade.Grader() as grader, pytest.raises(RuntimeError, match=r"broken for the test.*pip install"):
        grader.grade([("1+x", "x+1")])
    monkeypatch.setattr(grade.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"not installed.*pip install"):
        grade.Grader()


@pytest.mark.parametrize("setting", [{"workers": 0}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}, {"memory_mb": 1}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=f"config.reward.{next(iter(setting))}"):
        grade.Grader(**setting)


def test_a_large_trainer_does_not_make_its_workers_look_bloated():
    ballast = bytearray(700 * 2**20)  # touched, so that this process's peak is above half of a worker's limit
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])
    with grade.Grader(workers=1, memory_mb=1024) as grader:
        assert grader.grade([("x+1", "1+x")] * 2 + [("2x", "x+x")]) == [True] * 3
        assert grader.failures == 0
    del ballast
