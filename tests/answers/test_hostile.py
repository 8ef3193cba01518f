"""Texts that loop: no rule takes long over them, and none raises."""

import signal
import threading

import pytest

from capcur_jax.answers import kinds, letters, quantities, response, units
from capcur_jax.answers.spelling import ANSWER_LENGTH
from capcur_jax.rewards import compare, grade

PIECES = (
    "1", "1 ", "1x", "1 x ", "a", "a ", "A ", "A, ", "1,", "1,111", "1.", "1-", "1:", "a-b", "a_1", "{",
    "}", "\\over", "(", "[", "$", "x=", "=", "'", "^", "^{2}", "^\\circ", "\\cdot ", "a cdot ", "a \\cdot ",
    "*", "a*", "\\text{", "1/2", "1 1/2 ", "May 1, ", "of ", "and ", "or ", "(A) ", "1) ", "answer: ", "a/",
    "é", "a'", "sq ", "per ", "1e", "10^", "\\times 10^", "五", "1 cm ", "|", "!",
)  # fmt: skip
TAILS = "", "!", "\\", "=5", "(", "\n", "1"
GOLDS = "B", "A, C", "7", "0.5", "5 cm", "2023-05-01", "2 x 3", "H1N1", "left", "1, 2", "x+1", "(1, 2)"


def _texts():
    for piece in PIECES:
        yield from ((piece * 500)[: ANSWER_LENGTH - 8] + tail for tail in TAILS)


@pytest.fixture
def soon():
    """Fails what computes for longer than 5 seconds: a loop that never ends must not stop the tests."""

    def late(*_):
        raise TimeoutError("a rule takes too long")

    before = signal.signal(signal.SIGVTALRM, late)
    yield lambda seconds=5.0: signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("read", [kinds.answer_type_of, letters.letters_of, letters.options_of, response.last_boxed])
def test_no_gold_takes_long_or_raises(read, soon):
    for text in _texts():
        soon()
        read(text)


@pytest.mark.parametrize("gold", GOLDS)
def test_no_answer_takes_long_or_raises(gold, soon):
    wanted = kinds.gold_of(gold)
    for text in _texts():
        soon()
        verdict = compare.decide(text, wanted)
        assert verdict is not True or text.endswith("=5")  # a long name may be said to be 5


@pytest.mark.parametrize("text", [
    "20 degC^2", "5 fahrenheit^2", "1/2degC \\text{cm}", "5.5摄氏度^999", "5celsius per W",
    "1" * 310 + ".5", "1e999", "5 dB",
    "$5 cu",
])  # fmt: skip
def test_odd_numbers_and_units_are_text(text):
    kinds.answer_type_of(text)
    for gold in ("37摄氏度", "5 million W", "5", text[:5]):
        compare.decide(text, gold)


def test_an_answer_that_the_rules_cannot_take_is_wrong_and_counted(monkeypatch):
    def broken(predicted, gold):
        raise ZeroDivisionError

    monkeypatch.setattr(grade, "decide", broken)
    with grade.Grader(workers=1) as grader:
        assert grader.grade([("5", "5"), ("6", "6")]) == [False, False]
        assert grader.failures == 2


def test_units_are_read_in_several_threads():
    found, errors = [], []

    def read(number):
        try:
            found.append(quantities.quantity(f"{number} kilograms per cubic meter"))
        except Exception as error:
            errors.append(error)

    for cached in (units._registry, units.units_of, quantities.quantity):
        cached.cache_clear()
    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len({one.units for one in found}) == 1
