"""The section `checkpoint` of a recipe."""

from __future__ import annotations

from pydantic import Field

from bst_base.settings import Config


class CheckpointConfig(Config):
    every: int = Field(500, ge=0)
    """Steps between checkpoints; the last step always leaves one; 0: only that one."""
    background: bool = True
    """Write while training goes on, from a copy in host memory: 12 bytes per parameter, spread over the ranks.
    false: training waits until all is written."""
    failures: int = Field(3, ge=1)
    """How many checkpoints in a row may fail to be written; then the run stops, with status 74."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest to keep; older ones are removed once a newer one is committed, but for those below."""
    keep_best: int = Field(1, ge=0)
    """How many to keep of those with the lowest validation loss, evaluated at their own step."""
    keep_every: int = Field(0, ge=0)
    """Those whose step is a multiple of this are kept for good; 0: none."""
    weights_every: int = Field(0, ge=0)
    """Steps between checkpoints of the weights alone, kept for good: a third of the size, to evaluate and export, but
    nothing goes on from them; 0: none. A full one taken at such a step keeps its weights when it would be removed."""
    at: tuple[int, ...] = ()
    """Steps that have a checkpoint whatever `every` says, kept for good: where branches leave this run."""

    def scheduled(self, step: int) -> bool:
        """Whether every start of the run takes a checkpoint after so many steps, wherever it ends."""
        return step in self.at or bool(self.every and step % self.every == 0)
