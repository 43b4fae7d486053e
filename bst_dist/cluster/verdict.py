"""How a job ended: the end of each rank and host, which one caused it, and the exit status."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field

from bst_base.sizes import ranks_in_words
from bst_base.stopping import INTERRUPTED
from bst_dist.faults.status import DONE, FAILED, HUNG, RESUBMIT, USER_ERROR

SETTLE_S = 6.0
"""After a rank has failed: seconds to wait for reports that other ranks have failed too, and why."""
SETTLE_KILLED_S = 1.0
"""The same after a rank was killed by a signal: reports of other ranks would not change which rank is blamed."""
STOP = "told to stop ({}): the ranks write a checkpoint; Ctrl-C (again) ends them at once"
"""The message to the user when a signal has arrived."""
MOMENT_S = 1.0
"""If two ranks end within this many seconds, it is unknown which ended first: ranks are polled every tenth of a second,
and reports take time."""
ORDERLY = (DONE, RESUBMIT)
"""Exit statuses of ranks without an error."""


@dataclass(frozen=True)
class LeftAlone:
    """A host's agent stopped its ranks because it received nothing from the launching process."""

    silent_s: float
    when: float
    """Time by the clock of the watching process."""


@dataclass
class Ended:
    """The state of a job that has ended or is about to."""

    count: int
    """Number of watched ranks: all of the job, or those of one host."""
    statuses: dict[int, int] = field(default_factory=dict)
    """Exit statuses of ranks that ended by themselves (-N: by signal N); ranks killed with the job are missing."""
    when: dict[int, float] = field(default_factory=dict)
    """When these ranks ended, by the clock of the watching process."""
    cut_short: set[int] = field(default_factory=set)
    """Ranks that their host's agent killed because they took longer to stop than the grace period."""
    left_alone: dict[str, LeftAlone] = field(default_factory=dict)
    """Hosts whose agent received nothing from the launching process for too long."""
    lost: dict[str, str] = field(default_factory=dict)
    """Hosts that do not respond any more -> the reason."""
    stop_signal: int | None = None
    """The signal that stopped the launching process."""
    told: Mapping[str, int] = field(default_factory=dict)
    """Hosts whose agent was told to stop, by a scheduler for example -> the signal."""
    at_once: bool = False
    """Whether a second signal arrived, so that the checkpoint was not waited for."""

    def end(self, rank: int, status: int, when: float) -> None:
        """Record that a rank has ended."""
        self.statuses[rank], self.when[rank] = status, when

    @property
    def failed(self) -> bool:
        """Whether a host was lost or a rank failed, so that the other ranks cannot continue."""
        return bool(self.lost or self.cut_short) or any(status not in ORDERLY for status in self.statuses.values())

    @property
    def settle_s(self) -> float:
        """Seconds to wait after a failure for reports of the other ranks."""
        killed = any(status < 0 and status != -signal.SIGABRT for status in self.statuses.values())
        return min(SETTLE_S, SETTLE_KILLED_S) if killed else SETTLE_S

    @property
    def over(self) -> bool:
        """Whether all ranks have ended."""
        return len(self.gone) == self.count

    @property
    def gone(self) -> set[int]:
        """Ranks that have ended by themselves or were killed by their agent."""
        return self.statuses.keys() | self.cut_short

    @property
    def neglected(self) -> tuple[str, LeftAlone] | None:
        """The first host that was left alone, which is the cause of everything that ended later; None: no host was."""
        return min(self.left_alone.items(), key=lambda one: one[1].when, default=None)

    @property
    def culprit(self) -> int | None:
        """The rank that caused the failure: the first that failed; others fail because it is gone.

        Among ranks that failed within MOMENT_S of the first, it is the one whose status is most likely a cause. Ranks
        that failed after a host was left alone are not blamed.
        """
        until = self.neglected[1].when if self.neglected else math.inf
        wrong = {
            rank: when
            for rank, status in self.statuses.items()
            if status not in ORDERLY and (when := self.when.get(rank, 0.0)) <= until
        }
        first = min(wrong.values(), default=0.0)
        suspects = [rank for rank, when in wrong.items() if when <= first + MOMENT_S]
        return min(suspects, key=lambda rank: (_weight(self.statuses[rank]), wrong[rank], rank), default=None)

    @property
    def status(self) -> int:
        """The exit status of the whole job.

        When a scheduler has told the agents to stop, it ends the job soon. So a failure that a restart may cure then
        has the status with which the job is to be started again.
        """
        return RESUBMIT if self.told and self._curable else self._own_status

    @property
    def _own_status(self) -> int:
        """The exit status of the job if no agent was told to stop."""
        if self.lost:
            return FAILED
        if self.culprit is not None:
            status = self.statuses[self.culprit]
            return 128 - status if status < 0 else status
        if self.over and not self.failed:
            return RESUBMIT if RESUBMIT in self.statuses.values() else DONE
        if self.at_once:
            return INTERRUPTED
        return RESUBMIT if self.stop_signal else FAILED  # the grace period is over: resume from an older checkpoint

    @property
    def _curable(self) -> bool:
        """Whether a new start may succeed where this one did not.

        Not after a user error (including divergence), even if other ranks failed in other ways afterwards.
        """
        if not self.lost and USER_ERROR in self.statuses.values():
            return False
        status = self._own_status
        return status not in (*ORDERLY, USER_ERROR) or (status == RESUBMIT and bool(self.left_alone))

    @property
    def worth_a_restart(self) -> bool:
        """Whether to restart now. Not after a stop signal to this process or to an agent."""
        return self._curable and not self.stop_signal and not self.told

    def explain(self, host_of: Mapping[int, str]) -> str:
        """Return one line that says what happened and where; empty if nothing went wrong."""
        if self.lost:
            return "; ".join(f"lost {host}: {reason}" for host, reason in self.lost.items())
        if self.culprit is not None:
            return _failure(self.culprit, self.statuses[self.culprit], host_of.get(self.culprit, "this host"))
        if self.neglected and self.status != DONE:
            host, alone = self.neglected
            then = (
                "the ranks wrote a checkpoint and stopped"
                if self.over and not self.failed
                else "not all ranks stopped with a checkpoint in time"
            )
            return f"{host} got no sign of life from this process for {alone.silent_s:.0f} s (was it stopped?): {then}"
        if not self.over or self.cut_short:
            if self.at_once:
                return "a second signal: the ranks were killed"
            who = ranks_in_words(sorted(self.cut_short)) if self.cut_short else "some ranks"
            return f"killed because they did not stop within --grace: {who}"
        return ""


def lease_s(lost_after_s: float, grace_s: float) -> float:
    """Return how long the ranks of a cut-off host may run after the host was last heard from, in seconds.

    The host may have received messages until the launching process gave it up after `lost_after_s`. Then its agent
    waits `lost_after_s` too, and gives its ranks up to `lost_after_s` (or the grace period) for a checkpoint.
    """
    return 2 * lost_after_s + min(lost_after_s, grace_s)


def _failure(rank: int, status: int, host: str) -> str:
    if status == HUNG:
        return (
            f"all ranks hung and the watchdog ended them (status {HUNG}); the first to end was rank {rank} on "
            f"{host}; the watchdog's message above says what blocked the job"
        )
    how = f"ended with status {status}"
    if status == USER_ERROR:
        how += " (a wrong setting, or the run diverged): see its message above"
    if status < 0:
        how = f"was killed by {signal.Signals(-status).name}" + (" (out of memory?)" if status == -9 else "")
    return f"rank {rank} on {host} {how}"


def _weight(status: int) -> int:
    """Return the sort key of an exit status: causes come before consequences.

    torch and NCCL abort a process whose peers are gone, and a watchdog only reports a hang.
    """
    if status < 0:
        return 3 if status == -signal.SIGABRT else 0
    return {USER_ERROR: 1, HUNG: 4}.get(status, 2)
