"""Imports without the garbage collector, which would look through all modules again and again and find nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """While it is entered nothing is collected; what is there when it is first left is never looked through again.

    For imports alone: a cycle that is garbage by then stays. So only the first time: a process that runs many commands
    would keep the garbage of each.
    """
    if not gc.isenabled():  # entered within another, or somebody wants it so
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()
