"""Performance reports: time by phase, bytes sent, memory, and the slowest rank.

Every `log.every` steps the ranks exchange their own measurements, one row of numbers per rank. On accelerators only the
last step before a report is measured: in it the device is synchronised after each phase and each exchange. Such a step
is much slower, so after the first two reports at most one step in RARELY is measured.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bst_dist.parallel.phases import OCCASIONAL
from bst_dist.report.callback import Callback
from bst_dist.report.metrics import PerformanceReport, StepReport, Writer

if TYPE_CHECKING:
    from bst_dist.parallel.ranks import Ranks
    from bst_dist.parallel.sequence.group import SequenceGroup

OWN_WORK = ("data", "forward", "backward", "optimizer")
"""Phases of a rank's own work. Time that it waits for other ranks in them counts as communication."""


RARELY = 100
"""Fewest steps between two reports, if measuring makes a step slower."""
ROOM = 48
"""Smallest number of values in a row, without the digest; unused ones are 0."""


class Performance(Callback):
    """Callback that reports the performance of all ranks at intervals."""

    def __init__(
        self, every: int, ranks: Ranks, writers: Sequence[Writer], sharing: SequenceGroup | None, done: int = 0
    ) -> None:
        """`sharing`: the group of ranks that share this rank's sequences; None if it holds whole sequences. `done`:
        steps of the run so far.

        All ranks must call it.
        """
        self.every, self.ranks, self.writers, self.sharing = every, ranks, writers, sharing
        self._numbers = NamedNumbers(ranks)
        self._measured = self._since = 0
        """Number of steps measured, and of steps taken, since the last report."""
        ranks.phases.take()
        if sharing:
            sharing.traffic.take()
        ranks.phases.measure(self.due(done + 1))

    def due(self, step: int) -> bool:
        """Whether there is a report after `step` steps."""
        often = -(-RARELY // self.every) * self.every if self.ranks.phases.waits else self.every
        return step % often == 0 or (step % self.every == 0 and step <= 2 * self.every)

    def after_step(self, report: StepReport, last: bool) -> None:
        phases = self.ranks.phases
        self._measured += phases.measuring
        self._since += 1
        if self.due(report.step):
            seconds, sent = phases.take()
            sent |= self.sharing.traffic.take() if self.sharing else {}
            self._report(report, seconds, sent)
            self._measured = self._since = 0
        phases.measure(self.due(report.step + 1))

    def _report(self, report: StepReport, seconds: dict[str, float], sent: dict[str, float]) -> None:
        measured = max(1, self._measured)
        own = {
            f"seconds {phase}": spent / (self._since if phase in OCCASIONAL else measured)
            for phase, spent in seconds.items()
        }
        own |= {f"sent {kind}": count / self._since for kind, count in sent.items()}
        names, table = self._numbers.exchange({**own, MEMORY: self.ranks.memory_high_water()})
        if self.writers:
            found = summarise(report, names, table, self._numbers.hosts)
            for writer in self.writers:
                writer.write(found)


MEMORY = "memory"


class NamedNumbers:
    """Exchanges named numbers of every rank, in one collective that carries only the numbers.

    All ranks keep the same list of names. Each row begins with a digest of its rank's list. Only if the digests differ,
    because a rank has a number with a new name, the names are exchanged.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.hosts = ranks.all_gather_object(socket.gethostname())
        self._names: list[str] = []

    def exchange(self, own: dict[str, float]) -> tuple[list[str], Tensor]:
        """Return the names, and the numbers as (ranks, names), 0 if a rank has none. All ranks must call it."""
        new = [name for name in own if name not in self._names]
        while True:
            known = self._names if not new else None
            row = [own.get(name, 0.0) for name in known or ()]
            width = max(ROOM, len(self._names))
            table = self.ranks.all_gather_numbers([_digest(known), *row, *[0.0] * (width - len(row))])
            if known is not None and bool((table[:, 0] == table[0, 0]).all()):
                return self._names, table[:, 1 : 1 + len(self._names)]
            everyone = self.ranks.all_gather_object(new)
            self._names = list(dict.fromkeys([*self._names, *(name for theirs in everyone for name in theirs)]))
            new = []


def _digest(names: Sequence[str] | None) -> float:
    """Return a digest of a list of names as a number; -1, which no list has, if they are not agreed yet."""
    return -1.0 if names is None else float(zlib.crc32("\n".join(names).encode()))


def summarise(report: StepReport, names: Sequence[str], table: Tensor, hosts: Sequence[str]) -> PerformanceReport:
    """Combine the measurements of all ranks into one report.

    `table` (ranks, names) holds, per step, seconds by phase and bytes sent by kind, and the memory. `hosts`: the host
    of each rank.
    """
    columns = dict(zip(names, table.T, strict=True))
    seconds, sent = (
        {name.removeprefix(kind): column for name, column in columns.items() if name.startswith(kind)}
        for kind in ("seconds ", "sent ")
    )
    work = sum((seconds[phase] for phase in OWN_WORK if phase in seconds), torch.zeros(len(table), dtype=table.dtype))
    typical = float(work.median())
    slowest = int(work.argmax())
    memory = columns[MEMORY]
    return PerformanceReport(
        step=report.step,
        seconds={phase: float(column.mean()) for phase, column in seconds.items()},
        sent_bytes={kind: float(column.max()) for kind, column in sent.items()},
        memory_bytes=int(memory.max()),
        memory_rank=int(memory.argmax()),
        work_s=typical,
        slowest_rank=slowest,
        slowest_host=hosts[slowest],
        slowest_ratio=float(work[slowest]) / max(typical, 1e-9),
    )
