"""Progress of a preparation: bars on a terminal, in a log file one line for every tenth."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipeline.prepare.parallel import mpi_ranks

if TYPE_CHECKING:
    from data_pipeline.prepare.corpus import Progress as Report  # slow to import: only preparation needs it


class _Clocks(NamedTuple):
    """Seconds on two clocks."""

    elapsed: float
    cpu: float


class StageTimes:
    """Passes progress reports on, and records the times of the first and the last report of each stage."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._spans: dict[str, tuple[_Clocks, _Clocks]] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = _Clocks(time.monotonic(), time.process_time())
        start, _ = self._spans.get(stage, (now, now))
        self._spans[stage] = (start, now)
        self._report(stage, done, total)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage."""
        return {stage: round(end.elapsed - start.elapsed, 3) for stage, (start, end) in self._spans.items()}

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of this process in each stage. Without other workers, that is all of the CPU time."""
        return {stage: round(end.cpu - start.cpu, 3) for stage, (start, end) in self._spans.items()}


@contextmanager
def stages(console: Console) -> Iterator[StageTimes]:
    """Yield a function that a preparation calls to report its progress."""
    if console.is_terminal and mpi_ranks() == 1:  # ranks of mpirun see a terminal even if the output goes to a file
        with _bars(console) as bars:
            yield StageTimes(_on_bars(bars))
    else:
        yield StageTimes(_on_lines(console))


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def _on_bars(bars: Progress) -> Report:
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    return report


def _on_lines(console: Console) -> Report:
    said: dict[str, tuple[float, int]] = {}

    def report(stage: str, done: int, total: int) -> None:
        start, tenths = said.setdefault(stage, (time.monotonic(), 0))
        now = 10 if done >= total else 10 * done // total
        if now > tenths:
            taken = time.monotonic() - start
            left = f", {taken * (total - done) / done:,.0f} s left" if done < total else ""
            console.print(f"{stage:<16} {10 * now:>3} %  {taken:6.1f} s{left}", highlight=False)
            said[stage] = (start, now)

    return report
