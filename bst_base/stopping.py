"""Being told to stop: by Ctrl-C in a command that has something to show, or by a signal in the midst of a long wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from bst_base.errors import UserError

STATUS = 130
"""Exit status of a command that Ctrl-C has stopped: 128 + SIGINT."""
TOLD = threading.Event()
"""Set by the first signal, in a program that takes signals as a wish to stop (`bst_dist.faults.signals`). Whatever
waits for long, for a network say, looks at it."""


class Stopped(UserError):
    """A wait was left because the process was told to stop; nothing is wrong with what was waited for."""

    exit_status = 75
    """EX_TEMPFAIL of sysexits.h: start again."""


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
