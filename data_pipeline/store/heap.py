"""What the C library keeps of memory that was freed; measured with `bst bench index`.

Only glibc has these two calls; elsewhere they do nothing.
"""

from __future__ import annotations

import ctypes

_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h
_WORTH_IT = 4 << 20
_libc = ctypes.CDLL(None)


def share_arenas() -> None:
    """Let all threads allocate from two arenas.

    Else hundreds of threads that wait for a network spread what they free over eight arenas for each processor: 30 MB.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_ARENA_MAX, 2)


def give_back(freed: int) -> None:
    """Give back to the system what was freed, `freed` bytes or so: 18 MB after a manifest of 100,000 shards was parsed.

    A few megabytes are not worth the call, which walks through all that the process has.
    """
    if freed >= _WORTH_IT and hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
