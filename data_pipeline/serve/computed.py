"""The base of loaders whose rows are numbered in an endless series: row r of step t is row number t G + r of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np

from data_pipeline.serve.loader import require_same_order
from data_pipeline.serve.order.sizes import BatchSizes
from data_pipeline.serve.share import Share

B = TypeVar("B")


class ComputedLoader(ABC, Generic[B]):
    """The micro-batches and the state of one rank's loader; what a row holds is left to the subclass.

    Args:
        share: the part of each step that this rank reads.
        start_step: the step at which iteration begins.
    """

    def __init__(self, share: Share, start_step: int) -> None:
        self._share, self._start_step = share, start_step
        self._sizes = BatchSizes.of(share.rows)

    @abstractmethod
    def _batch(self, step: int, rows: np.ndarray) -> B:
        """Return the micro-batch of these rows (b,) of a step; `spread.MASKED` for masked rows."""

    @abstractmethod
    def _order_at(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint stores about the order after `step` training steps, except the number of rows."""

    def batches(self, step: int) -> list[B]:
        """Return this rank's micro-batches of a step. Calls are independent of each other."""
        return [self._batch(step, rows) for rows in self._share.micro_batches]

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint stores after `step` training steps."""
        return self._order_at(step) | self._sizes.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the order of `state`, which `state_dict` returned; `start_step` does not change.

        Raises UserError, naming the differences, unless it has the same order as this loader. The number of rows may
        change: from the step of `state` on it is that of this loader.
        """
        sizes = BatchSizes.from_state(state)
        step = state.get("step", 0)
        require_same_order(self._order_at(step) | sizes.state(), state)
        self._sizes = sizes.then(step, self._share.rows)
