from __future__ import annotations

import os
import signal
import threading

import pytest

from bst_base.stopping import deferred_interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_the_second_ends_the_work(number):
    before = signal.getsignal(number)
    with deferred_interrupt() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_another_thread_than_the_main_one_is_left_alone():
    found = []

    def work() -> None:
        with deferred_interrupt() as stop_requested:
            found.append(stop_requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
