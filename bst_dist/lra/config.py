"""The data section of a recipe that trains a classifier."""

from __future__ import annotations

from typing import ClassVar, Literal

from bst_base.settings import Config
from bst_dist.lra.tasks import TASKS


class LongRangeConfig(Config):
    """A task of the Long Range Arena, in place of a corpus."""

    documents: ClassVar[str] = "joined"  # a row holds one example
    mode: ClassVar[str] = "shuffled"

    task: Literal[tuple(TASKS)]  # type: ignore[valid-type]
    """What is classified."""
    examples: str
    """Directory of the task's examples, made by `bst lra prepare`."""
    pooling: Literal["mean", "last"] = "mean"
    """What the class is read from: the mean over the positions of a sequence, or its last position."""

    def urls(self) -> list[str]:
        """Where the data lies."""
        return [self.examples]
