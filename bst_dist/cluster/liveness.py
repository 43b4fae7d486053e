"""Measures how long each host has been silent, counting only the time in which this process listened.

A process that is stopped (Ctrl-Z, SIGSTOP, a sleeping laptop) or gets no CPU time receives nothing, and that is not the
hosts' fault. So silence is not measured in wall-clock time, but in time spent listening. In each turn the process reads
everything that is pending on all connections before the turn's time counts. If the process was stopped between two
turns, at most `MOST_S` of that time counts.
"""

from __future__ import annotations

import math
import selectors
import time
from collections.abc import Callable

MOST_S = 0.5
"""Maximum seconds that one turn can count; a normal turn takes a tenth of a second."""
DRIFT_S = 1e-4
"""Maximum drift in seconds of two computers' clocks between two heartbeats."""

Ready = list[tuple[selectors.SelectorKey, int]]


def look(
    selector: selectors.BaseSelector, seconds: float, clock: Callable[[], float] = time.monotonic
) -> tuple[float, Ready]:
    """Wait at most `seconds` for something to read. Return a time, and everything that is readable after that time.

    The result of the wait itself is not used: if the process was stopped in it, it ends with nothing (EINTR). The time
    is taken before the second select, so that messages which arrived before that time are never missed.
    """
    selector.select(seconds)
    return clock(), selector.select(0)


class ListeningClock:
    """Records when each host was last heard from, and converts times of its clock to this process's clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.listened_s = 0.0
        """Seconds spent listening since this object was created."""
        self._looked = clock()
        self._heard: dict[str, tuple[float, float]] = {}
        self._behind: dict[str, float] = {}

    def turn(self, selector: selectors.BaseSelector, seconds: float) -> Ready:
        """Listen for one turn; return the connections with pending data, which the caller must read."""
        now, found = look(selector, seconds, self.clock)
        self.listened_s += min(now - self._looked, MOST_S)
        self._looked = now
        return found

    def hear(self, host: str) -> None:
        """Record that something has arrived from a host."""
        self._heard[host] = self.listened_s, self.clock()

    def silent_s(self, host: str) -> float:
        """Return the seconds spent listening since something last arrived from a host."""
        return self.listened_s - self._heard[host][0]

    def last(self, host: str) -> float:
        """Return the time by `clock` at which something last arrived from a host."""
        return self._heard[host][1]

    def beat(self, host: str, at: float) -> None:
        """Update the clock offset of a host with a heartbeat that it sent at time `at` of its own clock.

        The difference of the clocks now is an upper bound of their offset. The fastest heartbeat gives the smallest
        bound; heartbeats that waited unread do not change it.
        """
        self._behind[host] = min(self.clock() - at, self._behind.get(host, math.inf) + DRIFT_S)

    def when(self, host: str, at: float) -> float:
        """Convert the time `at` of a host's clock to `clock`, also when the message waited unread for a long time."""
        now = self.clock()
        return min(now, at + self._behind[host]) if host in self._behind else now
