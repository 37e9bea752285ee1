"""SIGTERM and SIGINT stop a run at the next step, and only while it listens."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mmljax.training.preemption import Preemption


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_seen_at_the_next_step(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored in a job of a shell's background
    with Preemption() as preemption:
        assert not preemption.requested(1)
        os.kill(os.getpid(), number)
        assert preemption.requested(2)
        assert preemption.requested(3)
        assert preemption.exit_code == code
        for other in (signal.SIGTERM, signal.SIGINT):  # a second one ends the process
            assert signal.getsignal(other) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_earlier_handlers_are_restored() -> None:
    def own(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with Preemption():
            assert signal.getsignal(signal.SIGTERM) is not own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_sets_no_handler() -> None:
    answers = []

    def run() -> None:
        with Preemption() as preemption:
            answers.append(preemption.requested(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]
