"""How a job ended: what became of each rank and host, whose fault it was, and the status that says so."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field

from bst_dist.faults.status import DONE, FAILED, HUNG, RESUBMIT, USER_ERROR

SETTLE_S = 6.0
"""After a rank has failed: how long the others may take to say that they have too, and why."""
SETTLE_KILLED_S = 1.0
"""After one was killed: the others have nothing to say that would change whose fault it was."""
STOP = "told to stop ({}): the ranks write a checkpoint; Ctrl-C (again) ends them at once"
"""What the user is told when a signal has come."""
MOMENT_S = 1.0
"""Ranks of one host are looked at every tenth of a second, and what they say takes its time: ends that are less apart
are in no known order."""
ORDERLY = (DONE, RESUBMIT)
"""Statuses of ranks that nothing went wrong with."""


@dataclass(frozen=True)
class LeftAlone:
    """A host's agent heard nothing of the launching process, and had its ranks stop."""

    silent_s: float
    when: float
    """By the clock of the process that watches."""


@dataclass
class Ended:
    """What is known of a job that is over, or about to be."""

    count: int
    """Ranks that are watched: all of them, or those of one host."""
    statuses: dict[int, int] = field(default_factory=dict)
    """Of the ranks that ended by themselves; -N: by signal N. Those that were ended with the job are not in it."""
    when: dict[int, float] = field(default_factory=dict)
    """When they ended, by the clock of the process that watches."""
    cut_short: set[int] = field(default_factory=set)
    """Ranks that were killed by the agent of their host, because they took longer to stop than they were given."""
    left_alone: dict[str, LeftAlone] = field(default_factory=dict)
    """Hosts that heard nothing of the launching process for too long."""
    lost: dict[str, str] = field(default_factory=dict)
    """Hosts that were not heard of any more, and how that showed."""
    told: int | None = None
    """The signal that the launching process was stopped by."""
    at_once: bool = False
    """Whether it was told again, and so did not wait for the checkpoint."""

    def end(self, rank: int, status: int, when: float) -> None:
        """A rank has ended."""
        self.statuses[rank], self.when[rank] = status, when

    @property
    def failed(self) -> bool:
        """Whether something has gone wrong that the other ranks cannot continue without."""
        return bool(self.lost or self.cut_short) or any(status not in ORDERLY for status in self.statuses.values())

    @property
    def settle_s(self) -> float:
        """How long to wait for what the other ranks have to say."""
        killed = any(status < 0 and status != -signal.SIGABRT for status in self.statuses.values())
        return min(SETTLE_S, SETTLE_KILLED_S) if killed else SETTLE_S

    @property
    def over(self) -> bool:
        """Whether no rank is left."""
        return len(self.gone) == self.count

    @property
    def gone(self) -> set[int]:
        """Ranks that have ended, in whatever way."""
        return self.statuses.keys() | self.cut_short

    @property
    def neglected(self) -> tuple[str, LeftAlone] | None:
        """The first host that was left alone, which explains how everything ended that ended later."""
        return min(self.left_alone.items(), key=lambda one: one[1].when, default=None)

    @property
    def culprit(self) -> int | None:
        """The rank to blame: the first that failed. The others fail for want of it, each in its own way.

        Of those that failed within a moment of the first, the one whose status is most likely a cause. None is to
        blame for what it does after a host was left alone.
        """
        until = self.neglected[1].when if self.neglected else math.inf
        wrong = {rank: when for rank, status in self.statuses.items()
                 if status not in ORDERLY and (when := self.when.get(rank, 0.0)) <= until}  # fmt: skip
        first = min(wrong.values(), default=0.0)
        suspects = [rank for rank, when in wrong.items() if when <= first + MOMENT_S]
        return min(suspects, key=lambda rank: (_weight(self.statuses[rank]), wrong[rank], rank), default=None)

    @property
    def status(self) -> int:
        """The exit status of the whole."""
        if self.lost:
            return FAILED
        if self.culprit is not None:
            status = self.statuses[self.culprit]
            return 128 - status if status < 0 else status
        if self.over and not self.failed:
            return RESUBMIT if RESUBMIT in self.statuses.values() else DONE
        return 128 + self.told if self.told else FAILED  # the grace ran out

    @property
    def worth_a_restart(self) -> bool:
        """Whether starting again may end better, and nobody wanted the job to end.

        What is the user's to mend, divergence included, stays so whatever the other ranks died of in its wake.
        """
        if self.told or (not self.lost and USER_ERROR in self.statuses.values()):
            return False
        return self.status not in (*ORDERLY, USER_ERROR) or (self.status == RESUBMIT and bool(self.left_alone))

    def explain(self, host_of: Mapping[int, str]) -> str:
        """One line: what happened, and where."""
        if self.lost:
            return "; ".join(f"lost {host}: {reason}" for host, reason in self.lost.items())
        if self.culprit is not None:
            return _failure(self.culprit, self.statuses[self.culprit], host_of.get(self.culprit, "this host"))
        if self.neglected and self.status != DONE:
            host, alone = self.neglected
            then = ("the ranks wrote a checkpoint and stopped" if self.status == RESUBMIT else
                    "not all ranks stopped with a checkpoint in time")  # fmt: skip
            return f"{host} got no sign of life from this process for {alone.silent_s:.0f} s (was it stopped?): {then}"
        if not self.over or self.cut_short:
            return (
                "a second signal: the ranks were killed"
                if self.at_once
                else "not all ranks stopped within the grace period: killed"
            )
        return ""


def lease_s(lost_after_s: float, grace_s: float) -> float:
    """How long after a host was last heard of its ranks may live on, when the network to it is cut.

    It may have heard the launching process until that gave it up; then it waits as long itself, and leaves its ranks so
    long again for a checkpoint.
    """
    return 2 * lost_after_s + min(lost_after_s, grace_s)


def _failure(rank: int, status: int, host: str) -> str:
    if status == HUNG:
        return f"all ranks hung: watchdogs ended the job, the first on {host} (rank {rank}); see what they name"
    how = "refused" if status == USER_ERROR else f"ended with status {status}"
    if status < 0:
        how = f"was killed by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -9 else "")
    return f"rank {rank} on {host} {how}"


def _weight(status: int) -> int:
    """Causes before consequences: torch and NCCL abort a process whose peers are gone, and a watchdog only watches."""
    if status < 0:
        return 3 if status == -signal.SIGABRT else 0
    return {USER_ERROR: 1, HUNG: 4}.get(status, 2)
