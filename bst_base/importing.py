"""Imports without the garbage collector, which would scan all modules repeatedly and find nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Disable garbage collection in the block.

    At its first end, all existing objects are excluded from later collections. Use it only for imports: garbage cycles
    that exist at that time are never freed. That is why it happens only once: otherwise, a process that runs many
    commands would keep the garbage of each.
    """
    if not gc.isenabled():  # inside another such block, or disabled by the user
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()
