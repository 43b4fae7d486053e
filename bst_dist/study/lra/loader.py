"""The batches of a classifier's run, as a pure function of the examples, the seed and the step.

Row r of step t is example number t G + r of an endless series of passes, each a keyed permutation of all examples. So a
run resumes at any step, and the global batch does not depend on the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.lra.examples import Examples
from data_pipeline.serve.loader import check_state
from data_pipeline.serve.order.permutation import KEY_VERSION, Permutation
from data_pipeline.serve.order.sizes import BatchSizes
from data_pipeline.serve.share import Share
from data_pipeline.serve.spread import MASKED


class LengthError(UserError):
    """Examples that are longer than the rows they should go into."""


@dataclass(frozen=True)
class Labelled:
    """b examples of s sequences of at most l symbols."""

    input_ids: np.ndarray  # (b, s l) int64: each sequence padded at its end by zeros; a symbol's id is one more
    labels: np.ndarray  # (b,) int64
    loss_mask: np.ndarray  # (b,) bool: False for rows beyond the last example, and for masked ones
    rows: np.ndarray  # (b,) int64: global row numbers; -1 for masked rows (`serve.spread`)
    starts: None = None


class LabelledLoader:
    """Serves one rank its examples, step after step.

    Args:
        examples: of one split.
        share: which examples of each step this rank is served; its length is the most that a row holds of one sequence.
        seed: keys the order; None: one pass in the examples' own order, for evaluation.
        start_step: where iteration begins.

    Raises LengthError when a sequence does not fit and the task does not crop.
    """

    def __init__(self, examples: Examples, share: Share, *, seed: int | None, start_step: int = 0) -> None:
        if examples.longest > share.length and not examples.task.cropped:
            raise LengthError(
                f"{examples.where}: the longest example has {examples.longest:,} symbols and train.sequence_length "
                f"holds {share.length:,}: raise it, or prepare shorter examples"
            )
        self.examples, self._share, self._seed, self._start_step = examples, share, seed, start_step
        self._sizes = BatchSizes.of(share.rows)

    def __iter__(self) -> Iterator[tuple[int, list[Labelled]]]:
        """(step, this rank's micro-batches in order), from `start_step` on and without end."""
        step = self._start_step
        while True:
            yield step, self.batches(step)
            step += 1

    def batches(self, step: int) -> list[Labelled]:
        """This rank's micro-batches of a step."""
        return [self._batch(step, rows) for rows in self._share.micro_batches]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` steps were trained on."""
        return self._order_at(step) | self._sizes.state()

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError, naming what differs, unless `state` is of the same order as this loader's; the number of
        rows may be another from its step on."""
        sizes, step = BatchSizes.kept(state), state.get("step", 0)
        check_state(self._order_at(step) | sizes.state(), state)
        self._sizes = sizes.then(step, self._share.rows)

    def _order_at(self, step: int) -> dict[str, Any]:
        return {"order": KEY_VERSION, "examples": self.examples.sha256, "length": self._share.length,
                "seed": self._seed, "step": step}  # fmt: skip

    def close(self) -> None:
        """Nothing is held."""

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
        """Examples at positions of the endless series; beyond the last one when there is but one pass."""
        if self._seed is None:
            return positions
        total = len(self.examples)
        epochs, places = np.divmod(positions, total)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            numbers[inside] = Permutation(total, "lra", self._seed, epoch)(places[inside])
        return numbers
