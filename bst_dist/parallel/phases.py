"""Where a rank is in its step, what its time goes to, and what it sends.

One object a rank: the trainer enters phases and the communication notes its exchanges; the watchdog reads where the
rank is, from a thread of its own, and the performance report what that took. On the hot path that is an attribute set
and a clock read; an accelerator, which works on by itself, is waited for only in the steps that are measured.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COMMUNICATION = "communication"


class Phases:
    """The phases of one rank: data, forward, backward, optimizer, evaluate, checkpoint, report."""

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        """`synchronise` waits for the accelerator; None where there is none, and every step can be measured."""
        self._synchronise = synchronise
        self.measuring = synchronise is None
        self.name, self.step = "start", 0
        self.entered = 0
        """Phases entered so far; all ranks enter the same ones in the same order."""
        self.exchange, self.exchanges = "none", 0
        """The last exchange begun, and how many there were."""
        self._seconds: Counter[str] = Counter()
        self._since = time.perf_counter()
        self._sent: Counter[str] = Counter()

    def enter(self, name: str, step: int | None = None) -> None:
        """What follows is of phase `name`; and of step `step`, counted from 1, when it is given."""
        self._book(self.name)
        self.name, self.step = name, self.step if step is None else step
        self.entered += 1

    @property
    def waits(self) -> bool:
        """Whether measuring a step waits for an accelerator, and so makes the step longer."""
        return self._synchronise is not None

    @contextmanager
    def exchanging(self, kind: str, sent_bytes: float = 0) -> Iterator[None]:
        """An exchange with other ranks: its time is communication's, not the phase's that it happens in."""
        self.exchange, self.exchanges = kind, self.exchanges + 1
        self._sent[kind] += sent_bytes
        self._book(self.name)
        try:
            yield
        finally:
            self._book(COMMUNICATION)

    def measure(self, now: bool) -> None:
        """Whether the steps that follow are measured; without an accelerator all are."""
        self.measuring = now or self._synchronise is None
        if self.measuring:
            self._book("")

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds by phase and bytes sent by kind since the last call, of what was measured and of everything."""
        self._book(self.name)
        self._seconds.pop("", None)
        taken = dict(self._seconds), {kind: count for kind, count in self._sent.items() if count}
        self._seconds, self._sent = Counter(), Counter()
        return taken

    def _book(self, name: str) -> None:
        """Charge the time since the last call to `name`."""
        if not self.measuring:
            return
        if self._synchronise is not None:
            self._synchronise()
        now = time.perf_counter()
        self._seconds[name] += now - self._since
        self._since = now
