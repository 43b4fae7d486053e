"""The training steps of each start of a run, and the first of them, which do not show how fast it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WARM_UP_STEPS = 2
"""First steps of a start, not counted in times because they compile, allocate and connect."""


def by_start(lines: Sequence[dict[str, Any]], starts: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return for each start the lines of its steps, possibly none.

    Args:
        lines: training steps in order; of a step that was taken again, only the line of the last time.
        starts: entries of environment.json. One without `from_step` began at step 0.
    """
    begins = [start.get("from_step", 0) for start in starts]
    found: list[list[dict[str, Any]]] = [[] for _ in starts]
    for line in lines:
        found[max((index for index, begin in enumerate(begins) if begin < line["step"]), default=0)].append(line)
    return found
