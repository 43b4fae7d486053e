"""What CUDA's allocator held when memory ran out, written where the run is, to be looked at afterwards."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

VIEWER = "https://pytorch.org/memory_viz"
ENTRIES = 100_000
"""Allocations that are remembered with where they were made."""


def record_history() -> None:
    """From now on remember who allocates what, on CUDA; elsewhere nothing."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=ENTRIES)


@contextmanager
def snapshot_when_out_of_memory(run_dir: Path, rank: int) -> Iterator[None]:
    """When memory runs out in the block, write a snapshot into the run directory and name it in the error.

    It is written while the error is being handled, so what the failed pass had allocated is still there.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(_snapshot(run_dir / f"memory-rank-{rank:05d}.pickle"))
        raise


def _snapshot(path: Path) -> str:
    """What was written, or why nothing was."""
    try:
        with path.open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
    except Exception as error:  # the run has failed already: this must not hide why
        return f"no snapshot of the memory was written: {error}"
    return (
        f"memory snapshot: {path} (open it at {VIEWER}; with log.memory_history=true it shows which line allocated "
        "what). How to use less memory: docs/troubleshooting.md, out of memory"
    )
