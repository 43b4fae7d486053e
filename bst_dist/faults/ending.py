"""Ending a process whose threads may hang in the kernel.

A thread that waits for a file system that hangs is ended by no signal, and until it is, the kernel tells whoever waits
for the process that it still runs. So a rank says its exit status to the process that started it through a pipe as
well. And what it says on the way out it says in a thread: its standard error may lie on the same file system.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import NoReturn

from bst_dist.faults.stacks import stacks_of_threads

LAST_WORD = "BST_LAST_WORD"
"""The environment variable that names the pipe's file descriptor."""
SAY_S = 5.0
"""How long standard error may take to take a message."""


def end(status: int, message: str = "", stacks: bool = False) -> NoReturn:
    """End this process now, whatever its threads do; `stacks`: say where they are."""
    if message:
        say(message, stacks)
    with suppress(OSError, ValueError, KeyError):
        os.write(int(os.environ[LAST_WORD]), b"%d\n" % status)
    os._exit(status)


def say(message: str, stacks: bool = False) -> None:
    """Print to standard error, past Python's buffer, which another thread may hold; waits no longer than SAY_S."""

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
