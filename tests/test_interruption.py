"""Ctrl-C is a request first and an order the second time."""

import signal

import pytest

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
