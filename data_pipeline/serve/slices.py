"""Micro-batches whose sequences are delivered slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

from data_pipeline.serve.batch import Batch

T = TypeVar("T")


class Slices(Sequence[Batch], Generic[T]):
    """The slices of a micro-batch, from the first to the last.

    The tokens are held once, as they are stored (two or four bytes each). A slice gets its trainer layout when it is
    asked for.
    """

    def __init__(self, stored: Sequence[T], lay_out: Callable[[T], Batch]) -> None:
        self._stored, self._lay_out = stored, lay_out

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Batch:
        return self._lay_out(self._stored[index])


MicroBatch: TypeAlias = Batch | Sequence[Batch]
"""Some rows of a step, whole or in slices."""


class Blank(list[MicroBatch]):
    """Placeholders for micro-batches of a step that could not be read: the same rows and shapes, all padding.

    With them a rank takes part in the collectives of a step that has no effect.
    """


def slices_of(micro_batch: MicroBatch) -> Sequence[Batch]:
    """Return the slices of a micro-batch, in order. A whole micro-batch is its only slice."""
    return micro_batch if isinstance(micro_batch, Sequence) else (micro_batch,)


def changed(micro_batch: MicroBatch, change: Callable[[Batch], Batch]) -> MicroBatch:
    """Return the micro-batch with `change` applied to every slice, when that slice is asked for."""
    return Slices(micro_batch, change) if isinstance(micro_batch, Sequence) else change(micro_batch)
