"""SIGTERM is heard between two steps, and only while somebody listens."""

from __future__ import annotations

import os
import signal
import threading

from mmljax.training.preemption import Preemption


def test_a_notice_is_heard_at_the_next_step() -> None:
    with Preemption() as preemption:
        assert not preemption.requested(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested(2)
        assert preemption.requested(3)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends it


def test_what_listened_before_listens_after() -> None:
    def own(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with Preemption():
            assert signal.getsignal(signal.SIGTERM) is not own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_nobody_listens() -> None:
    answers = []

    def run() -> None:
        with Preemption() as preemption:
            answers.append(preemption.requested(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]
