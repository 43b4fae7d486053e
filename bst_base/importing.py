"""Imports without the garbage collector, which would look through all modules again and again and find nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """While it is entered nothing is collected; what is there when it is left is never looked through again.

    For imports alone: a cycle that is garbage by then stays.
    """
    if not gc.isenabled():  # entered within another, or somebody wants it so
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
