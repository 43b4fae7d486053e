"""Ends a process whose threads may hang in the kernel.

No signal ends a thread that waits for a hanging file system. Until that wait ends, the kernel reports to the parent
process that the process still runs. So a rank also sends its exit status to its parent through a pipe. It prints its
last message in a thread, because its standard error may be on the same file system.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import NoReturn

from bst_dist.faults.stacks import stacks_of_threads

LAST_WORD = "BST_LAST_WORD"
"""The environment variable with the pipe's file descriptor."""
SAY_S = 5.0
"""Maximum seconds to wait until the message is written to standard error."""


def end(status: int, message: str = "", stacks: bool = False) -> NoReturn:
    """End this process immediately, whatever its threads do; `stacks`: print their stacks after the message."""
    if message:
        say(message, stacks)
    with suppress(OSError, ValueError, KeyError):
        os.write(int(os.environ[LAST_WORD]), b"%d\n" % status)
    os._exit(status)


def say(message: str, stacks: bool = False) -> None:
    """Print to standard error, waiting at most SAY_S.

    Python's buffer is bypassed, because another thread may hold its lock.
    """

    def write() -> None:
        with suppress(OSError):
            _write(message + "\n")
            if stacks:
                _write(stacks_of_threads())

    thread = threading.Thread(target=write, name="last words", daemon=True)
    thread.start()
    thread.join(SAY_S)


def _write(text: str) -> None:
    data = text.encode(errors="backslashreplace")
    while data:
        data = data[os.write(2, data) :]
