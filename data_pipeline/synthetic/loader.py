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
from data_pipeline.serve.share import Share
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
        share: what this rank is served of each step; the task must have no `problem` with its length.
        seed: keys the rows.
        start_step: where iteration begins.
    """

    def __init__(self, config: SyntheticConfig, split: str, share: Share, *, seed: int, start_step: int = 0) -> None:
        self.config, self._split, self._share = config, split, share
        self._seed, self._start_step = seed, start_step
        self._prefetcher: Prefetcher | None = None

    def __iter__(self) -> Iterator[tuple[int, list[SyntheticBatch | Slices]]]:
        """(step, this rank's micro-batches in order), from `start_step` on and without end."""
        self.close()
        self._prefetcher = Prefetcher(self.batches, self._start_step, self.config.prefetch)
        return iter(self._prefetcher)

    def batches(self, step: int) -> list[SyntheticBatch | Slices]:
        """This rank's micro-batches of a step; calls have no effect on each other."""
        return [self._batch(step, np.array(rows)) for rows in self._share.micro_batches()]

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` steps were trained on."""
        task = hashlib.sha256(self.config.synthetic.model_dump_json().encode()).hexdigest()[:16]
        return {"tasks": TASK_VERSION, "task": task, "split": self._split, "length": self._share.length,
                "rows": self._share.rows, "seed": self._seed, "step": step}  # fmt: skip

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError, naming what differs, unless `state` is of the same order as this loader's."""
        check_state(self.state(state.get("step", 0)), state)

    def close(self) -> None:
        """Stop the prefetch thread; a second call does nothing."""
        if self._prefetcher:
            self._prefetcher.close()

    def _batch(self, step: int, rows: np.ndarray) -> SyntheticBatch | Slices:
        share = self._share
        numbers = (step * share.rows + rows).tolist()
        drawn = [draw(self.config.synthetic, self._split, self._seed, number, share.length) for number in numbers]
        tokens, distance = (np.stack(parts) for parts in zip(*drawn, strict=True))

        def part(begin: int) -> SyntheticBatch:
            own, behind = slice(begin, begin + share.tokens), slice(begin + 1, begin + share.tokens + 1)
            back = distance[:, behind]
            return SyntheticBatch(tokens[:, own], tokens[:, behind], back > 0, back, rows, begin)

        return share.laid_out(share.begins, part)


def draw(task: TaskConfig, split: str, seed: int, number: int, length: int) -> Row:
    """Row `number` of the endless series of a task's split."""
    return task.row(Draws(f"synthetic/{TASK_VERSION}/{split}", seed, number), length)
