"""The section `checkpoint` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from bst_base.places import LocalPath
from bst_base.settings import Config

LOCAL_COPIES_KEPT = 3
"""Maximum number of local copies of one rank on a node at the same time."""


class CheckpointConfig(Config):
    every: int = Field(500, ge=0, le=2**40)
    """Steps between checkpoints; the last step always has one. 0: only at the last step."""
    background: bool = True
    """Write checkpoints while training continues, from a copy in host memory: 12 bytes per parameter, spread over the
    ranks. false: training waits until everything is written."""
    failures: int = Field(3, ge=1, le=2**20)
    """The run stops with status 74 after this many failed checkpoints in a row."""
    keep_last: int = Field(2, ge=1, le=2**40)
    """How many of the newest checkpoints to keep. Older ones are removed when a newer one is complete, except those
    below."""
    keep_best: int = Field(1, ge=0, le=2**40)
    """How many checkpoints with the lowest validation loss to keep. Only losses evaluated at the checkpoint's own step
    count."""
    keep_best_on: str = "validation"
    """The loss that keep_best compares and `bst ckpt ls` shows: `validation`, or a name from evaluation.corpora."""
    keep_every: int = Field(0, ge=0, le=2**40)
    """Never remove checkpoints whose step is a multiple of this; 0: no such rule."""
    weights_every: int = Field(0, ge=0, le=2**40)
    """Steps between weights-only checkpoints, which are never removed; 0: none. They have a third of the size and can
    be evaluated and exported, but no run can resume from them. A full checkpoint at such a step keeps its weights when
    it is removed."""
    at: tuple[Annotated[int, Field(ge=1, le=2**40)], ...] = ()
    """Steps that always have a checkpoint, never removed: the points where branches start."""
    local_every: int = Field(0, ge=0, le=2**40)
    """Steps between local copies, in the memory of each rank's node and of a neighbour node; 0: none. After a restart
    the run resumes from the newest complete one without reading a checkpoint."""
    local_directory: LocalPath = Path("/dev/shm")
    """Where a node keeps local copies; /dev/shm is its memory. It must not be on a file system that nodes share."""

    def scheduled(self, step: int) -> bool:
        """Whether every start of the run takes a full checkpoint after `step` steps, wherever the start ends."""
        return step in self.at or bool(self.every and step % self.every == 0)

    def wanted(self, step: int) -> bool:
        """Whether a checkpoint is taken after `step` steps, full or weights-only."""
        return self.scheduled(step) or bool(self.weights_every and step % self.weights_every == 0)
