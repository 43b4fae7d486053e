"""Ctrl-C in a command that has something to show for what it has done so far."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 130
"""Exit status of a command that Ctrl-C has stopped: 128 + SIGINT."""


@contextmanager
def heeding() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C or SIGTERM is only remembered; what is yielded says whether one has come.

    The work is to ask between two of its pieces. A second signal ends the command as usual, by KeyboardInterrupt.
    Outside of the main thread, where Python takes no signals, nothing changes.
    """
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return

    def take(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
