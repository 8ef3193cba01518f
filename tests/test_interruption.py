"""Ctrl-C is a request first and an order the second time."""

import signal
import threading
import time

import pytest

from capcur_jax.devices import programs
from capcur_jax.interruption import Interrupted, Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_check_and_the_second_stops_at_once(number):
    with Interruption() as interruption:
        interruption.check()  # nothing came
        signal.raise_signal(number)
        with pytest.raises(Interrupted, match=number.name):
            interruption.check()
        with pytest.raises(Interrupted):  # asked again, it says so again
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_signals_of_two_kinds_are_two_signals():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGTERM"):
            interruption.check()


def test_handlers_are_put_back_even_after_an_error():
    def before(number, frame):
        raise AssertionError("the handler of before")

    kinds = (signal.SIGINT, signal.SIGTERM)
    kept = [signal.signal(number, before) for number in kinds]
    try:
        with pytest.raises(RuntimeError), Interruption():
            assert all(signal.getsignal(number) is not before for number in kinds)
            raise RuntimeError
        assert all(signal.getsignal(number) is before for number in kinds)
        with pytest.raises(AssertionError, match="the handler of before"):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in zip(kinds, kept, strict=True):
            signal.signal(number, handler)


def test_where_nothing_is_lost_a_signal_stops_at_once():
    with Interruption() as interruption:
        with pytest.raises(Interrupted, match="SIGTERM"), interruption.at_once():
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it went on")
        with pytest.raises(Interrupted, match="SIGTERM"), interruption.at_once():  # one that came before
            raise AssertionError("it began")
    with Interruption() as interruption, interruption.at_once():
        pass
    with Interruption() as interruption:
        with interruption.at_once():
            pass
        signal.raise_signal(signal.SIGINT)  # past it: remembered
        with pytest.raises(Interrupted):
            interruption.check()


def test_one_of_several_processes_stops_where_all_do():
    with Interruption(alone=False) as interruption:
        with interruption.at_once():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            interruption.check()


def test_a_signal_is_heard_while_a_program_is_compiled():
    """XLA does not return to Python for minutes; the main thread must not be the one that is in there."""
    compiled, started = threading.Event(), time.monotonic()
    with Interruption() as interruption, pytest.raises(Interrupted), interruption.at_once():
        threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGTERM]).start()
        programs.in_background(lambda: compiled.wait(60))
    compiled.set()
    assert time.monotonic() - started < 10


def test_what_compiling_raises_is_raised():
    assert programs.in_background(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        programs.in_background(lambda: 1 / 0)


def test_what_swallows_the_first_raise_does_not_swallow_the_signal(capsys):
    class Garbage:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    started = time.monotonic()
    with Interruption() as interruption, pytest.raises(Interrupted), interruption.at_once():
        garbage = Garbage()
        del garbage  # Python drops what a finalizer raises
        time.sleep(30)
    assert time.monotonic() - started < 5 and "ignored" not in capsys.readouterr().err
