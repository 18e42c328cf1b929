"""SIGTERM and Ctrl-C: the first is noticed, the second does what it did before, or its default.

The handlers before are set here: how pytest was started does not matter.
"""

import contextlib
import signal
import threading

import pytest

from train.loop.interrupt import Interrupt

both = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@contextlib.contextmanager
def handled_by(handler):
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)


@both
def test_the_second_signal_does_what_it_did_before(number):
    calls = []

    def handler(number, frame):
        calls.append(number)

    with handled_by(handler):
        with Interrupt() as interrupt:
            assert interrupt.requested() == ""
            signal.raise_signal(number)
            assert interrupt.requested() == number.name and calls == []
            signal.raise_signal(number)
            assert calls == [number]
        assert signal.getsignal(number) is handler


@both
@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_of_a_signal_that_was_ignored_the_second_ends_the_process(number, before):
    with handled_by(before):
        with Interrupt() as interrupt:
            signal.raise_signal(number)
            assert interrupt.requested() == number.name
            assert signal.getsignal(number) is signal.SIG_DFL
        assert signal.getsignal(number) is before


def test_outside_the_main_thread_signals_are_left_alone():
    asked = []

    def run():
        with Interrupt() as interrupt:
            asked.append((interrupt.requested(), signal.getsignal(signal.SIGTERM)))

    with handled_by(signal.SIG_IGN):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert asked == [("", signal.SIG_IGN)]
