"""Code that runs on every rank after each step of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from bst_base.errors import StorageError
from bst_dist.report.metrics import StepReport, Writer


class Callback:
    """Base class for code that runs on every rank after each step."""

    phase: ClassVar[str] = "report"
    """Phase that its time is reported under."""

    def after_step(self, report: StepReport, last: bool) -> None:
        """Called after each step; `last`: no step follows in this start."""

    def after_interruption(self) -> None:
        """Called when a signal ends training before the next step, so that no step was the `last`."""


class Log(Callback):
    """Passes each step's report to the writers. Raises StorageError if one cannot write."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = writers

    def after_step(self, report: StepReport, last: bool) -> None:
        for writer in self.writers:
            try:
                writer.write(report)
            except OSError as error:
                raise StorageError.of(error, writer.path, doing="write") from None
