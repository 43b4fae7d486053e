"""The batches of a classifier's run, as a pure function of the examples, the seed and the step.

Row r of step t is example t G + r of an endless series of epochs, where G is the global batch size. Each epoch is a
keyed permutation of all examples. So a run resumes at any step, and the global batch does not depend on the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.lra.examples import Examples
from data_pipeline.serve.computed import ComputedLoader
from data_pipeline.serve.order.permutation import KEY_VERSION, Permutation
from data_pipeline.serve.share import Share
from data_pipeline.serve.spread import MASKED


class LengthError(UserError):
    """The examples are longer than the rows of a batch."""


@dataclass(frozen=True)
class Labelled:
    """A batch of b examples of s sequences with at most l symbols each."""

    input_ids: np.ndarray  # (b, s l) int64: symbol + 1, each sequence padded at its end by zeros
    labels: np.ndarray  # (b,) int64
    loss_mask: np.ndarray  # (b,) bool: False for rows beyond the last example, and for masked rows
    rows: np.ndarray  # (b,) int64: global row numbers; -1 for masked rows (`serve.spread`)
    starts: None = None


class LabelledLoader(ComputedLoader[Labelled]):
    """Iterates over the micro-batches of one rank.

    Args:
        examples: the examples of one split.
        share: selects the rank's rows of each step. Its length is the maximum number of symbols per sequence.
        seed: key of the order; None: one pass in the stored order, for evaluation.
        start_step: first step of the iteration.

    Raises LengthError if a sequence does not fit and the task does not crop sequences.
    """

    def __init__(self, examples: Examples, share: Share, *, seed: int | None, start_step: int = 0) -> None:
        if examples.longest > share.length and not examples.task.cropped:
            raise LengthError(
                f"{examples.where}: the longest example has {examples.longest:,} symbols and train.sequence_length "
                f"holds {share.length:,}: raise train.sequence_length, or prepare shorter examples"
            )
        super().__init__(share, start_step)
        self.examples, self._seed = examples, seed

    def __iter__(self) -> Iterator[tuple[int, list[Labelled]]]:
        """Yield (step, this rank's micro-batches in order), from `start_step` on, without end."""
        step = self._start_step
        while True:
            yield step, self.batches(step)
            step += 1

    def _order_at(self, step: int) -> dict[str, Any]:
        return {
            "order": KEY_VERSION,
            "examples": self.examples.sha256,
            "length": self._share.length,
            "seed": self._seed,
            "step": step,
        }

    def close(self) -> None:
        """Do nothing: the loader holds no resources."""

    def _batch(self, step: int, rows: np.ndarray) -> Labelled:
        numbers = self._numbers(self._sizes.first(step) + rows)
        task, there = self.examples.task, (numbers < len(self.examples)) & (rows != MASKED)
        ids = np.zeros((len(rows), task.sequences, self._share.length), np.int64)
        for row in np.flatnonzero(there):
            for place, symbols in enumerate(self.examples.sequences(numbers[row])):
                kept = symbols[: self._share.length]
                ids[row, place, : len(kept)] = kept.astype(np.int64) + 1
        labels = self.examples.classes[np.where(there, numbers, 0)].astype(np.int64)
        return Labelled(ids.reshape(len(rows), -1), labels, there, rows)

    def _numbers(self, positions: np.ndarray) -> np.ndarray:
        """Return the examples at positions of the endless series; without a seed, the positions themselves."""
        if self._seed is None:
            return positions
        total = len(self.examples)
        epochs, places = np.divmod(positions, total)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            numbers[inside] = Permutation(total, "lra", self._seed, epoch)(places[inside])
        return numbers
