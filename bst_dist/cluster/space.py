"""The disk space that a run needs for its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bst_base.errors import StorageError
from bst_dist.checkpoint.directory import size
from bst_dist.checkpoint.retention import readable

MOST_BYTES = 16
"""Upper bound of a checkpoint's bytes per parameter: weights, averaged weights (if any) and Adam's two moments, in
single precision."""


@dataclass(frozen=True)
class Space:
    """Free space that is required for some checkpoints."""

    checkpoints: int
    bytes: int
    """Of all these checkpoints together."""


def space_for_checkpoints(run_dir: Path, parameters: int) -> Space:
    """Return the free space that a start of a run needs for checkpoints of a model with so many parameters.

    A new run needs space for two: one is kept until the next one is written. A run that already has a full checkpoint
    needs space for one more, of the same size. If this host cannot read the directory, that size is estimated.
    """
    try:
        held = [size(one.manifest) for one in readable(run_dir) if one.full]
    except StorageError:
        return Space(1, MOST_BYTES * parameters)
    return Space(1, held[0]) if held else Space(2, 2 * MOST_BYTES * parameters)
