"""The batches of a synthetic task, as a pure function of the task, the seed and the step.

Row r of step t is row number t G + r of an endless series, each drawn from a key of its own. So a run resumes at any
step, the global batch does not depend on the ranks, and no row comes twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.serve.loader import check_state
from data_pipeline.serve.prefetch import Prefetcher
from data_pipeline.serve.slices import Slices
from data_pipeline.synthetic.config import SyntheticConfig
from data_pipeline.synthetic.draws import Draws
from data_pipeline.synthetic.task import TASK_VERSION, Row, TaskConfig


@dataclass(frozen=True)
class SyntheticBatch:
    """b rows, of each the slice of l = L / sp tokens that one rank holds."""

    input_ids: np.ndarray  # (b, l) int64
    labels: np.ndarray  # (b, l) int64: the token after each input
    loss_mask: np.ndarray  # (b, l) bool: the label counts
    distance: np.ndarray  # (b, l) int64: tokens from the label back to its answer; 0 where it does not count
    rows: np.ndarray  # (b,) int64: global row numbers
    begin: int  # the slice's first token in its row
    starts: None = None


class SyntheticLoader:
    """Serves one rank its slices, step after step.

    Args:
        config: what is drawn.
        split: "train" or "validation": rows of another split have other keys.
        length: L, inputs of a row; the task must have no `problem` with it.
        rows: G, rows of a step over all ranks.
        micro_rows: rows of a micro-batch of one rank; G is a multiple of dp * micro_rows.
        seed: keys the rows.
        dp_rank, dp, sp_rank, sp: which rows, and which share of each slice.
        slice_tokens: tokens of a slice, over all ranks that share it; None: a row is one slice.
        start_step: where iteration begins.
    """

    def __init__(
        self,
        config: SyntheticConfig,
        split: str,
        *,
        length: int,
        rows: int,
        micro_rows: int,
        seed: int,
        dp_rank: int = 0,
        dp: int = 1,
        sp_rank: int = 0,
        sp: int = 1,
        slice_tokens: int | None = None,
        start_step: int = 0,
    ) -> None:
        self.config, self._split, self._seed = config, split, seed
        self._length, self._rows, self._micro_rows, self._start_step = length, rows, micro_rows, start_step
        self._own = range(dp_rank * rows // dp, (dp_rank + 1) * rows // dp)
        self._sliced, span = slice_tokens is not None, slice_tokens or length
        self._share = span // sp
        self._begins = range(sp_rank * self._share, length, span)
        self._prefetcher: Prefetcher | None = None

    def __iter__(self) -> Iterator[tuple[int, list[SyntheticBatch | Slices]]]:
        """(step, this rank's micro-batches in order), from `start_step` on and without end."""
        self.close()
        self._prefetcher = Prefetcher(self.batches, self._start_step, self.config.prefetch)
        return iter(self._prefetcher)

    def batches(self, step: int) -> list[SyntheticBatch | Slices]:
        """This rank's micro-batches of a step; calls have no effect on each other."""
        starts = range(self._own.start, self._own.stop, self._micro_rows)
        return [self._batch(step, np.arange(start, start + self._micro_rows)) for start in starts]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` steps were trained on."""
        task = hashlib.sha256(self.config.synthetic.model_dump_json().encode()).hexdigest()[:16]
        return {"tasks": TASK_VERSION, "task": task, "split": self._split, "length": self._length, "rows": self._rows,
                "seed": self._seed, "step": step}  # fmt: skip

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError, naming what differs, unless `state` is of the same order as this loader's."""
        check_state(self.state(state.get("step", 0)), state)

    def close(self) -> None:
        """Stop the prefetch thread; a second call does nothing."""
        if self._prefetcher:
            self._prefetcher.close()

    def _batch(self, step: int, rows: np.ndarray) -> SyntheticBatch | Slices:
        numbers = (step * self._rows + rows).tolist()
        drawn = [draw(self.config.synthetic, self._split, self._seed, number, self._length) for number in numbers]
        tokens, distance = (np.stack(parts) for parts in zip(*drawn, strict=True))

        def part(begin: int) -> SyntheticBatch:
            own, behind = slice(begin, begin + self._share), slice(begin + 1, begin + self._share + 1)
            back = distance[:, behind]
            return SyntheticBatch(tokens[:, own], tokens[:, behind], back > 0, back, rows, begin)

        return Slices(self._begins, part) if self._sliced else part(self._begins[0])


def draw(task: TaskConfig, split: str, seed: int, number: int, length: int) -> Row:
    """Row `number` of the endless series of a task's split."""
    return task.row(Draws(f"synthetic/{TASK_VERSION}/{split}", seed, number), length)
