"""Where the time goes, what is sent, how much memory it takes, and which rank the others wait for.

Every `log.every` steps the ranks gather what each has measured of itself. On accelerators that is the last step before
alone: in it each phase and each exchange is waited for, and the others run as fast as they can.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from statistics import median_low
from typing import TYPE_CHECKING, Any

from bst_dist.report.metrics import Callback, PerformanceReport, StepReport, Writer

if TYPE_CHECKING:
    from bst_dist.parallel.group import SequenceGroup
    from bst_dist.parallel.ranks import Ranks

OWN_WORK = ("data", "forward", "backward", "optimizer")
"""Phases in which a rank works by itself; what it waits for the others in them goes down as communication."""


class Performance(Callback):
    """Reports the ranks' performance at intervals."""

    def __init__(self, every: int, ranks: Ranks, writers: Sequence[Writer], sharing: SequenceGroup | None) -> None:
        """`sharing`: the ranks that hold the other slices of this rank's sequences, None when it holds whole ones."""
        self.every, self.ranks, self.writers, self.sharing = every, ranks, writers, sharing
        self._host = socket.gethostname()
        self._steps = 0
        """Measured since the last report."""
        ranks.phases.take()
        if sharing:
            sharing.traffic.take()
        ranks.phases.measure(every == 1)

    def after_step(self, report: StepReport, last: bool) -> None:
        phases = self.ranks.phases
        self._steps += phases.measuring
        if report.step % self.every == 0:
            seconds, sent = phases.take()
            sent |= self.sharing.traffic.take() if self.sharing else {}
            self._report(report, seconds, {kind: count / self.every for kind, count in sent.items()})
            self._steps = 0
        phases.measure((report.step + 1) % self.every == 0)

    def _report(self, report: StepReport, seconds: dict[str, float], sent: dict[str, float]) -> None:
        steps = max(1, self._steps)
        own = {
            "host": self._host,
            "seconds": {phase: spent / steps for phase, spent in seconds.items()},
            "sent": sent,
            "memory": self.ranks.memory_high_water(),
        }
        found = summarise(report, self.ranks.gather(own))
        for writer in self.writers:
            writer.write(found)


def summarise(report: StepReport, ranks: Sequence[dict[str, Any]]) -> PerformanceReport:
    """All ranks' measurements in one report; each has its host, seconds by phase and bytes sent by kind, of a step."""
    phases = dict.fromkeys(phase for rank in ranks for phase in rank["seconds"])
    kinds = dict.fromkeys(kind for rank in ranks for kind in rank["sent"])
    work = [sum(rank["seconds"].get(phase, 0.0) for phase in OWN_WORK) for rank in ranks]
    memory = [rank["memory"] for rank in ranks]
    slowest = max(range(len(ranks)), key=work.__getitem__)
    return PerformanceReport(
        step=report.step,
        seconds={phase: sum(rank["seconds"].get(phase, 0.0) for rank in ranks) / len(ranks) for phase in phases},
        sent_bytes={kind: max(rank["sent"].get(kind, 0.0) for rank in ranks) for kind in kinds},
        memory_bytes=max(memory),
        memory_rank=memory.index(max(memory)),
        work_s=median_low(work),
        slowest_rank=slowest,
        slowest_host=ranks[slowest]["host"],
        slowest_ratio=work[slowest] / max(median_low(work), 1e-9),
    )
