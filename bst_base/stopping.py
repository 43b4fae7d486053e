"""Requests to stop: Ctrl-C in a command with partial results, or a signal during a long wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from bst_base.errors import UserError

INTERRUPTED = 130
"""Exit status of a command that was stopped by Ctrl-C: 128 + SIGINT."""
STOP_REQUESTED = threading.Event()
"""Set by the first signal, in a program that treats signals as requests to stop (`bst_dist.faults.signals`). All code
that may wait for a long time, for example for a network, checks it."""


class Stopped(UserError):
    """A wait ended because the process was asked to stop. It does not mean that anything is wrong."""

    exit_status = 75
    """EX_TEMPFAIL of sysexits.h: start again."""


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block, only record the first Ctrl-C or SIGTERM. Yields a function that returns whether one has come.

    The work should call it between two of its parts. A second signal ends the command as usual, by KeyboardInterrupt.
    Outside the main thread, where Python handles no signals, nothing changes.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    def take(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
