from __future__ import annotations

import os
import signal
import threading

import pytest

from bst_base.stopping import deferred_interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_recorded_and_second_interrupts(number):
    before = signal.getsignal(number)
    with deferred_interrupt() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_signal_handling_is_skipped_outside_the_main_thread():
    found = []

    def work() -> None:
        with deferred_interrupt() as stop_requested:
            found.append(stop_requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
