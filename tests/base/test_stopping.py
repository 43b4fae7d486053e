from __future__ import annotations

import os
import signal
import threading

import pytest

from bst_base.stopping import heeding


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_the_second_ends_the_work(number):
    before = signal.getsignal(number)
    with heeding() as told:
        assert not told()
        os.kill(os.getpid(), number)
        assert told()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_another_thread_than_the_main_one_is_left_alone():
    found = []

    def work() -> None:
        with heeding() as told:
            found.append(told())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
