"""Trace of some steps by torch's profiler, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, supported_activities

from bst_dist.report.callback import Callback
from bst_dist.report.metrics import StepReport

DIRECTORY = "profile"


class Profile(Callback):
    """Callback that traces the steps of a window; each rank writes its own file."""

    def __init__(
        self, window: tuple[int, int], run_dir: Path, rank: int, done: int, say: Callable[[str], None]
    ) -> None:
        """`window`: first and last step, counted from 1; `done`: number of steps taken before this start."""
        self.first, self.last = window
        self.path = run_dir / DIRECTORY / f"steps-{self.first}-{self.last}-rank-{rank:05d}.json.gz"
        self.say = say
        self._profiler: Any = None
        self._start_if_due(done)

    def after_step(self, report: StepReport, last: bool) -> None:
        if last or report.step == self.last:
            self._write(str(report.step))
        self._start_if_due(report.step)

    def after_interruption(self) -> None:
        self._write("")

    def _write(self, when: str) -> None:
        """Write the trace, if one has begun."""
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.path))
        self._profiler = None
        self.say(f"{when:>12} trace {self.path}")

    def _start_if_due(self, done: int) -> None:
        if done + 1 == self.first:
            activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
            self._profiler = profile(activities=activities, record_shapes=True, with_stack=False).__enter__()
