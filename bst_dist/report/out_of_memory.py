"""Snapshot of CUDA's allocator when memory runs out, written to the run directory for later inspection."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

VIEWER = "https://pytorch.org/memory_viz"
ENTRIES = 100_000
"""Number of allocations recorded with their stack traces."""


def record_history() -> None:
    """Start to record which code allocates what. Only on CUDA; elsewhere nothing happens."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=ENTRIES)


@contextmanager
def snapshot_when_out_of_memory(run_dir: Path, rank: int) -> Iterator[None]:
    """If memory runs out in the block, write a snapshot to the run directory and name the file in the error.

    It is written while the error is handled, so the allocations of the failed pass still exist.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(_snapshot(run_dir / f"memory-rank-{rank:05d}.pickle"))
        raise


def _snapshot(path: Path) -> str:
    """Write the snapshot; return a message with its path, or with the reason why it could not be written."""
    try:
        with path.open("wb") as file:
            pickle.dump(torch.cuda.memory._snapshot(), file)
    except Exception as error:  # must not hide the out-of-memory error
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return f"no snapshot of the memory was written: {error}"
    return (
        f"memory snapshot: {path} (open it at {VIEWER}; with log.memory_history=true it shows which line allocated "
        "what). How to use less memory: docs/troubleshooting.md, out of memory"
    )
