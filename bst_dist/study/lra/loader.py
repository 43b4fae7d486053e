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
from bst_dist.parallel.mesh import Mesh
from bst_dist.study.lra.examples import Examples
from data_pipeline.serve.loader import check_state
from data_pipeline.serve.order import KEY_VERSION, Permutation


class LengthError(UserError):
    """Examples that are longer than the rows they should go into."""


@dataclass(frozen=True)
class Labelled:
    """b examples of s sequences of at most l symbols."""

    input_ids: np.ndarray  # (b, s l) int64: each sequence padded at its end by zeros; a symbol's id is one more
    labels: np.ndarray  # (b,) int64
    loss_mask: np.ndarray  # (b,) bool: False for rows beyond the last example
    rows: np.ndarray  # (b,) int64: global row numbers
    starts: None = None


class LabelledLoader:
    """Serves one rank its examples, step after step.

    Args:
        examples: of one split.
        length: l, the most that a row holds of one sequence.
        rows: G, examples of a step over all ranks.
        micro_rows: examples of a micro-batch of one rank; G is a multiple of ranks * micro_rows.
        seed: keys the order; None: one pass in the examples' own order, for evaluation.
        mesh: which of the rows are this rank's.
        start_step: where iteration begins.

    Raises LengthError when a sequence does not fit and the task does not crop.
    """

    def __init__(self, examples: Examples, *, length: int, rows: int, micro_rows: int, seed: int | None,
                 mesh: Mesh, start_step: int = 0) -> None:  # fmt: skip
        if examples.longest > length and not examples.task.cropped:
            raise LengthError(
                f"{examples.where}: the longest example has {examples.longest:,} symbols and train.sequence_length "
                f"holds {length:,}: raise it, or prepare shorter examples"
            )
        self.examples, self._length, self._rows, self._micro_rows = examples, length, rows, micro_rows
        self._seed, self._start_step = seed, start_step
        self._own = range(mesh.dp_rank * rows // mesh.dp, (mesh.dp_rank + 1) * rows // mesh.dp)

    def __iter__(self) -> Iterator[tuple[int, list[Labelled]]]:
        """(step, this rank's micro-batches in order), from `start_step` on and without end."""
        step = self._start_step
        while True:
            yield step, self.batches(step)
            step += 1

    def batches(self, step: int) -> list[Labelled]:
        """This rank's micro-batches of a step."""
        starts = range(self._own.start, self._own.stop, self._micro_rows)
        return [self._batch(step, np.arange(start, start + self._micro_rows)) for start in starts]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` steps were trained on."""
        return {"order": KEY_VERSION, "examples": self.examples.sha256, "length": self._length, "rows": self._rows,
                "seed": self._seed, "step": step}  # fmt: skip

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError, naming what differs, unless `state` is of the same order as this loader's."""
        check_state(self.state(state.get("step", 0)), state)

    def close(self) -> None:
        """Nothing is held."""

    def _batch(self, step: int, rows: np.ndarray) -> Labelled:
        numbers = self._numbers(step * self._rows + rows)
        task, there = self.examples.task, numbers < len(self.examples)
        ids = np.zeros((len(rows), task.sequences, self._length), np.int64)
        for row in np.flatnonzero(there):
            for place, symbols in enumerate(self.examples.sequences(numbers[row])):
                kept = symbols[: self._length]
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
