"""The section `checkpoint` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from bst_base.places import LocalPath
from bst_base.settings import Config


class CheckpointConfig(Config):
    every: int = Field(500, ge=0, le=2**40)
    """Steps between checkpoints; the last step always has one; 0: only that one."""
    background: bool = True
    """Write while training continues, from a copy in host memory: 12 bytes per parameter, spread over the ranks.
    false: training waits until all is written."""
    failures: int = Field(3, ge=1, le=2**20)
    """After this many failed checkpoints in a row the run stops with status 74."""
    keep_last: int = Field(2, ge=1, le=2**40)
    """How many of the newest to keep; older ones are removed once a newer one is committed, except those below."""
    keep_best: int = Field(1, ge=0, le=2**40)
    """How many to keep of those with the lowest validation loss, evaluated at their own step."""
    keep_best_on: str = "validation"
    """The loss that this goes by, and that `bst ckpt ls` shows: `validation`, or a name of evaluation.corpora."""
    keep_every: int = Field(0, ge=0, le=2**40)
    """Checkpoints whose step is a multiple of this are never removed; 0: none."""
    weights_every: int = Field(0, ge=0, le=2**40)
    """Steps between checkpoints of the weights alone, never removed: a third of the size, to evaluate and export, but
    no run can resume from them; 0: none. A full checkpoint at such a step keeps its weights when it is removed."""
    at: tuple[Annotated[int, Field(ge=1, le=2**40)], ...] = ()
    """Steps that have a checkpoint whatever `every` says, never removed: where branches start."""
    local_every: int = Field(0, ge=0, le=2**40)
    """Steps between local copies, in the memory of each rank's node and of a neighbour node: after a restart the run
    resumes from the newest of them that is complete, without reading a checkpoint; 0: none."""
    local_directory: LocalPath = Path("/dev/shm")
    """Where a node keeps local copies; by default in its memory. Not on a file system that nodes share."""

    def scheduled(self, step: int) -> bool:
        """Whether every start of the run takes a checkpoint after so many steps, wherever it ends."""
        return step in self.at or bool(self.every and step % self.every == 0)

    def wanted(self, step: int) -> bool:
        """The same, of the weights alone or with all that a run resumes from."""
        return self.scheduled(step) or bool(self.weights_every and step % self.weights_every == 0)
