"""The data section of a recipe that trains a classifier on a Long Range Arena task."""

from __future__ import annotations

from typing import ClassVar, Literal

from bst_base.places import Address
from bst_base.settings import Config
from bst_dist.model.config import ModelConfig
from bst_dist.parallel.config import ParallelConfig
from bst_dist.study.lra.tasks import TASKS


class LongRangeConfig(Config):
    """A task of the Long Range Arena, in place of a corpus."""

    documents: ClassVar[str] = "joined"  # a row holds one example
    mode: ClassVar[str] = "shuffled"

    task: Literal[tuple(TASKS)]  # type: ignore[valid-type]
    """The classification task."""
    examples: Address
    """Directory of the task's examples, made by `bst lra prepare`."""
    pooling: Literal["mean", "last"] = "mean"
    """Where the class is read from: the mean over all positions of a sequence, or its last position."""

    def require_fit(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        """Raise ValueError unless the other sections of the recipe fit this task."""
        ids = TASKS[self.task].vocab_size
        if model.vocab_size != ids:
            raise ValueError(f"model.vocab_size must be {ids} for the task {self.task}: its symbols, and padding")
        if not model.tied:
            raise ValueError("model.tied: false adds a head of tokens, which a task does not have: leave it out")
        if parallel.sp > 1:
            raise ValueError("parallel.sp must be 1 for a task: a sequence is pooled on one rank")

    def urls(self) -> list[str]:
        """Return the locations of the data."""
        return [self.examples]
