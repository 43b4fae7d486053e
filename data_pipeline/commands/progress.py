"""How far a preparation is: bars on a terminal, a line every tenth in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipeline.prepare import Progress as Report


@contextmanager
def stages(console: Console) -> Iterator[Report]:
    """Yield what a preparation calls to say how far it is."""
    if console.is_terminal:
        with _bars(console) as bars:
            yield _on_bars(bars)
    else:
        yield _on_lines(console)


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
            console.print(f"{stage:<16} {10 * now:>3} %  {time.monotonic() - start:6.1f} s", highlight=False)
            said[stage] = (start, now)

    return report
