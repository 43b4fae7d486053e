"""The batches of a synthetic task, as a pure function of the task, the seed and the step.

Row r of step t is row number t G + r of an endless series. Each row is drawn from its own key. So a run resumes at any
step, the global batch does not depend on the ranks, and no row occurs twice. Rows longer than a sequence are read over
several steps: with k sequences per row, row r of step t is sequence t mod k of row number (t div k) G + r.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.computed import ComputedLoader
from data_pipeline.serve.order.sizes import STREAMED
from data_pipeline.serve.prefetch import Prefetcher
from data_pipeline.serve.share import Share
from data_pipeline.serve.slices import Slices
from data_pipeline.serve.spread import MASKED
from data_pipeline.synthetic.config import SyntheticConfig
from data_pipeline.synthetic.draws import Draws
from data_pipeline.synthetic.task import TASK_VERSION, Row, TaskConfig


@dataclass(frozen=True)
class SyntheticBatch:
    """The slices of b rows that one rank holds, each of l = L / sp tokens; all arrays are contiguous."""

    input_ids: np.ndarray  # (b, l) int64
    labels: np.ndarray  # (b, l) int64: the token after each input
    loss_mask: np.ndarray  # (b, l) bool: which labels count
    distance: np.ndarray  # (b, l) int64: tokens from the label back to its answer; 0 for labels that do not count
    rows: np.ndarray  # (b,) int64: global row numbers; -1 for masked rows (`serve.spread`)
    begin: int  # the position of the slice's first token in its sequence
    continues: np.ndarray  # (b,) bool: the sequence follows the row's sequence of the step before
    starts: None = None


class SyntheticLoader(ComputedLoader[SyntheticBatch | Slices]):
    """Serves the slices of one rank, step after step.

    Args:
        config: the task and its settings.
        split: "train" or "validation". The rows of different splits have different keys.
        share: the part of each step that this rank reads, in sequences of L inputs.
        row_tokens: inputs of a row, a multiple of L; the task must have no `problem` with it. None: L.
        seed: keys the rows.
        start_step: the step at which iteration begins.
    """

    def __init__(
        self,
        config: SyntheticConfig,
        split: str,
        share: Share,
        *,
        seed: int,
        start_step: int = 0,
        row_tokens: int | None = None,
    ) -> None:
        super().__init__(share, start_step)
        self.config, self._split, self._seed = config, split, seed
        self._steps = (row_tokens or share.length) // share.length
        """The number of steps over which a row is read."""
        self._prefetcher: Prefetcher | None = None

    def __iter__(self) -> Iterator[tuple[int, list[SyntheticBatch | Slices]]]:
        """Yield (step, the micro-batches of this rank in order), from `start_step` on, without end."""
        self.close()
        self._prefetcher = Prefetcher(self.batches, self._start_step, self.config.prefetch)
        return iter(self._prefetcher)

    def _order_at(self, step: int) -> dict[str, Any]:
        task = hashlib.sha256(self.config.synthetic.model_dump_json().encode()).hexdigest()[:16]
        order = {
            "tasks": TASK_VERSION,
            "task": task,
            "split": self._split,
            "length": self._share.length,
            "seed": self._seed,
            "step": step,
        }
        return order | ({"row_steps": self._steps} if self._steps > 1 else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ComputedLoader`. The number of rows cannot change if rows are read over several steps."""
        super().load_state_dict(state)
        if self._steps > 1 and self._sizes.since:
            raise UserError(f"{self._share.rows} rows per step from step {self._sizes.since} on: {STREAMED}")

    def close(self) -> None:
        """Stop the prefetch thread. A second call does nothing."""
        if self._prefetcher:
            self._prefetcher.close()

    def _batch(self, step: int, rows: np.ndarray) -> SyntheticBatch | Slices:
        share, (series, piece) = self._share, divmod(step, self._steps)
        first = piece * share.length
        length, nothing = self._steps * share.length, np.zeros(self._steps * share.length + 1, np.int64)
        drawn = [
            Row(nothing, nothing)
            if row == MASKED
            else draw(self.config.synthetic, self._split, self._seed, self._sizes.first(series) + row, length)
            for row in rows.tolist()
        ]
        tokens, distance = (np.stack(parts)[:, first : first + share.length + 1] for parts in zip(*drawn, strict=True))
        continues = np.full(len(rows), piece > 0)

        def part(begin: int) -> SyntheticBatch:
            own, behind = slice(begin, begin + share.tokens), slice(begin + 1, begin + share.tokens + 1)
            ids, labels, back = map(np.ascontiguousarray, (tokens[:, own], tokens[:, behind], distance[:, behind]))
            return SyntheticBatch(ids, labels, back > 0, back, rows, begin, continues)

        return share.laid_out(share.begins, part)


def draw(task: TaskConfig, split: str, seed: int, number: int, length: int) -> Row:
    """Return row `number` of the endless series of a task's split."""
    return task.row(Draws(f"synthetic/{TASK_VERSION}/{split}", seed, number), length)
