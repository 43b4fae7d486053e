"""Locks of a cache's files between the processes of a machine."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from bst_base.locks import flock


def take_lock(path: Path) -> TextIO | None:
    """Take the lock of a lock file without waiting; return the open file, or None if another holder has the lock.

    Closing the file gives the lock back. Only its holder may remove the file: a process that had opened it before then
    locks a file without a name, and takes the lock of the file that has the name instead.
    """
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("w"))
            if not flock(file, path):
                return None
            if _has_name(file, path):
                stack.pop_all()  # the caller closes it
                return file


def _has_name(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
