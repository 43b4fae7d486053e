"""An exponential moving average of the weights (train.average), updated after each step and evaluated beside them.

After step t, counted from 1, ``average = d average + (1 - d) weights`` with ``d = min(decay, (1 + t) / (10 + t))``. It
starts as the initial weights. Each rank averages the weights that its optimizer updates, without communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bst_dist.checkpoint.directory import AVERAGE, WEIGHT
from bst_dist.checkpoint.fragments import EngineState
from bst_dist.report.callback import Callback
from bst_dist.report.metrics import SkippedReport, StepReport
from bst_dist.train.config import AverageConfig


class Average(Callback):
    """Keeps the average of an engine's weights."""

    phase = "optimizer"

    def __init__(self, config: AverageConfig, state: EngineState) -> None:
        self.config, self.state = config, state

    def after_step(self, report: StepReport, last: bool) -> None:
        """Update the average after a step, unless the step was skipped and changed no weight."""
        if not isinstance(report, SkippedReport):
            averages, weights = self._tensors()
            torch._foreach_lerp_(averages, weights, 1 - decay(self.config, report.step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Compute with the averaged weights inside the context; every rank must enter it.

        Weights and average are swapped, so this needs extra memory for one fragment only. Afterwards the weights are
        bitwise the same as before. An error leaves them swapped and ends the run: swapping back takes a collective, in
        which the rank with the error would wait for the others and never report it.
        """
        self._exchange()
        yield
        self._exchange()

    def _exchange(self) -> None:
        for average, weight in zip(*self._tensors(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self.state.publish()

    def _tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        fragments = self.state.held()
        return [fragment.values[AVERAGE] for fragment in fragments], [fragment.values[WEIGHT] for fragment in fragments]


def decay(config: AverageConfig, step: int) -> float:
    """Return the share of the old average that is kept in step `step`, counted from 1."""
    return min(config.decay, (1 + step) / (10 + step))
