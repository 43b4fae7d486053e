"""The window of sliding attention: the settings of one layer that do not depend on the slice."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """The keys that each query sees, and how many of their distances have a bias of their own."""

    size: int
    """Number of keys: the last ones up to the query's own position."""
    include_self: bool = True
    """Whether distance 0 is seen; otherwise distance `size` is seen instead."""
    varying: int | None = None
    """The bias is constant from this distance on; None: it varies everywhere."""
