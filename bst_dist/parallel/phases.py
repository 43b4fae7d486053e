"""The current phase of a rank's step, the time of each phase, and the bytes that the rank sends.

Each rank has one object. The trainer enters phases, and the communication records its exchanges. The watchdog reads the
current phase from its own thread, and the performance report reads the times. The cost on the hot path is setting an
attribute and reading a clock. An accelerator runs asynchronously; the rank waits for it only in steps that are
measured.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COMMUNICATION = "communication"
OCCASIONAL = "evaluate", "checkpoint"
"""Phases that are always measured, with their communication: few steps have them, so the steps measured may have none.
"""


class Phases:
    """The phases of one rank: data, forward, backward, optimizer, evaluate, checkpoint, report."""

    def __init__(self, synchronise: Callable[[], None] | None = None) -> None:
        """`synchronise` waits for the accelerator; None: there is none, and every step is measured."""
        self._synchronise = synchronise
        self.measuring = synchronise is None
        self.name, self.step = "start", 0
        self.entered = 0
        """Phases entered so far; all ranks enter the same ones in the same order."""
        self.exchange, self.exchanges = "none", 0
        """The kind of the last exchange begun, and the number of exchanges so far."""
        self._seconds: Counter[str] = Counter()
        self._since = time.perf_counter()
        self._sent: Counter[str] = Counter()

    def enter(self, name: str, step: int | None = None) -> None:
        """Begin phase `name`, and step `step` (counted from 1) if it is given."""
        if name != self.name or name not in OCCASIONAL:  # within these, each part enters again
            self._book(self.name)
            begins = name in OCCASIONAL and not self._timed
            self.name = name
            if begins:
                self._book("")
        self.step = self.step if step is None else step
        self.entered += 1

    @property
    def _timed(self) -> bool:
        return self.measuring or self.name in OCCASIONAL

    @property
    def waits(self) -> bool:
        """Whether measuring a step waits for an accelerator, which makes the step longer."""
        return self._synchronise is not None

    @contextmanager
    def exchanging(self, kind: str, sent_bytes: float = 0) -> Iterator[None]:
        """Context manager for an exchange with other ranks. Its time counts as communication, or as the phase's in
        an OCCASIONAL one."""
        self.exchange, self.exchanges = kind, self.exchanges + 1
        self._sent[kind] += sent_bytes
        self._book(self.name)
        try:
            yield
        finally:
            self._book(self.name if self.name in OCCASIONAL else COMMUNICATION)

    def measure(self, now: bool) -> None:
        """Set whether the following steps are measured. Without an accelerator all are."""
        self.measuring = now or self._synchronise is None
        if self.measuring:
            self._book("")

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return seconds by phase and bytes sent by kind since the last call: the seconds of measured steps, those of
        OCCASIONAL phases and the bytes of all steps."""
        self._book(self.name)
        self._seconds.pop("", None)
        taken = dict(self._seconds), {kind: count for kind, count in self._sent.items() if count}
        self._seconds, self._sent = Counter(), Counter()
        return taken

    def _book(self, name: str) -> None:
        """Add the time since the last call to phase `name`."""
        if not self._timed:
            return
        if self._synchronise is not None:
            self._synchronise()
        now = time.perf_counter()
        self._seconds[name] += now - self._since
        self._since = now
