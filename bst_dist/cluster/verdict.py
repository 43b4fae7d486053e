"""How a job ended: what became of each rank and host, whose fault it was, and the status that says so."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field

from bst_dist.faults.status import DONE, FAILED, HUNG, RESUBMIT, USER_ERROR

SETTLE_S = 6.0
"""After a rank has failed: how long the others may take to say that they have too, and why."""
STOP = "told to stop ({}): the ranks write a checkpoint; one more signal ends them at once"
"""What the user is told when a signal has come."""
ORDERLY = (DONE, RESUBMIT)
"""Statuses of ranks that nothing went wrong with."""


@dataclass
class Ended:
    """What is known of a job that is over, or about to be."""

    count: int
    """Ranks that are watched: all of them, or those of one host."""
    statuses: dict[int, int] = field(default_factory=dict)
    """Of the ranks that ended by themselves; -N: by signal N. Those that were ended with the job are not in it."""
    lost: dict[str, str] = field(default_factory=dict)
    """Hosts that were not heard of any more, and how that showed."""
    told: int | None = None
    """The signal that the launching process was stopped by."""
    at_once: bool = False
    """Whether it was told again, and so did not wait for the checkpoint."""

    @property
    def failed(self) -> bool:
        """Whether something has gone wrong that the other ranks cannot go on without."""
        return bool(self.lost) or any(status not in ORDERLY for status in self.statuses.values())

    @property
    def over(self) -> bool:
        """Whether no rank is left."""
        return len(self.statuses) == self.count

    @property
    def culprit(self) -> int | None:
        """The rank to blame: when one is killed the others fail for want of it, and must not be taken for the cause."""
        wrong = {rank: status for rank, status in self.statuses.items() if status not in ORDERLY}
        return min(wrong, key=lambda rank: (_weight(wrong[rank]), rank)) if wrong else None

    @property
    def status(self) -> int:
        """The exit status of the whole."""
        if self.lost:
            return FAILED
        if self.culprit is not None:
            status = self.statuses[self.culprit]
            return 128 - status if status < 0 else status
        if self.over:
            return RESUBMIT if RESUBMIT in self.statuses.values() else DONE
        return 128 + self.told if self.told else FAILED  # the grace ran out

    @property
    def worth_a_restart(self) -> bool:
        """Whether starting again may end better, and nobody wanted the job to end."""
        return not self.told and self.status not in (*ORDERLY, USER_ERROR)

    def explain(self, host_of: Mapping[int, str]) -> str:
        """One line: what happened, and where."""
        if self.lost:
            return "; ".join(f"lost {host}: {reason}" for host, reason in self.lost.items())
        if self.culprit is None:
            killed = "told again: killed" if self.at_once else "not all ranks stopped within the grace: killed"
            return "" if self.over else killed
        status = self.statuses[self.culprit]
        how = {HUNG: "hung", USER_ERROR: "refused"}.get(status, f"ended with status {status}")
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -9 else "")
        return f"rank {self.culprit} on {host_of.get(self.culprit, 'this host')} {how}"


def _weight(status: int) -> int:
    """Causes before consequences."""
    if status < 0:
        return 0
    return {USER_ERROR: 1, HUNG: 3}.get(status, 2)
