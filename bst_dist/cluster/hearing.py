"""How long each host has been silent, counted in time in which this process listened.

A process that is stopped (Ctrl-Z, SIGSTOP, a laptop asleep) or starved hears nothing meanwhile, and the hosts are not
to blame for that. So silence is not measured by a clock on the wall but by one that runs only while this process takes
turns listening: a turn reads everything that waits, on all connections, before its time counts, and however long this
process was away between two turns, no more than `MOST_S` of it counts.
"""

from __future__ import annotations

import math
import selectors
import time
from collections.abc import Callable

MOST_S = 0.5
"""The longest that one turn can count; a normal one takes a tenth of a second."""
DRIFT_S = 1e-4
"""How much two computers' clocks may drift apart between two heartbeats."""

Ready = list[tuple[selectors.SelectorKey, int]]


def look(selector: selectors.BaseSelector, seconds: float, clock: Callable[[], float] = time.monotonic
         ) -> tuple[float, Ready]:  # fmt: skip
    """Wait so long for something to read. Returns a time, and all that can be read and has come by then.

    The wait itself does not tell what has come: one in which the process was stopped ends with nothing (EINTR). And the
    time is taken before the look, so that no stop can lie between the two.
    """
    selector.select(seconds)
    return clock(), selector.select(0)


class Hearing:
    """When each host was last heard of, and when what it tells of happened, by this process's clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.listened_s = 0.0
        """Of this object's life."""
        self._looked = clock()
        self._heard: dict[str, tuple[float, float]] = {}
        self._behind: dict[str, float] = {}

    def turn(self, selector: selectors.BaseSelector, seconds: float) -> Ready:
        """One turn of listening: all connections on which something waits, which the caller must read."""
        now, found = look(selector, seconds, self.clock)
        self.listened_s += min(now - self._looked, MOST_S)
        self._looked = now
        return found

    def hear(self, host: str) -> None:
        """Something has come from a host."""
        self._heard[host] = self.listened_s, self.clock()

    def silent_s(self, host: str) -> float:
        """Seconds listened since something last came from a host."""
        return self.listened_s - self._heard[host][0]

    def last(self, host: str) -> float:
        """When something last came from a host, by `clock`."""
        return self._heard[host][1]

    def beat(self, host: str, at: float) -> None:
        """A heartbeat sent at `at` by the host's own clock has come: this clock is ahead of that by no more than now
        shows. The quickest heartbeat shows it best; those that waited unread show nothing."""
        self._behind[host] = min(self.clock() - at, self._behind.get(host, math.inf) + DRIFT_S)

    def when(self, host: str, at: float) -> float:
        """The time `at` of a host's own clock by `clock`, however long the message about it waited unread."""
        now = self.clock()
        return min(now, at + self._behind[host]) if host in self._behind else now
