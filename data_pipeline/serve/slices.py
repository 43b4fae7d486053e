"""Micro-batches whose sequences are handed over slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

from data_pipeline.serve.batch import Batch

T = TypeVar("T")


class Slices(Sequence[Batch], Generic[T]):
    """A micro-batch in slices, from the first to the last.

    The tokens are held once, as they are stored (two bytes each, or four); a slice is laid out when it is asked for.
    """

    def __init__(self, stored: Sequence[T], lay_out: Callable[[T], Batch]) -> None:
        self._stored, self._lay_out = stored, lay_out

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Batch:
        return self._lay_out(self._stored[index])


MicroBatch: TypeAlias = Batch | Sequence[Batch]
"""Some rows of a step: whole, or in slices."""


class Blank(list[MicroBatch]):
    """Micro-batches that stand in for those of a step which are not there: the same rows and shapes, all padding.

    With them a rank takes part in the exchanges of a step that comes to nothing.
    """


def slices_of(micro_batch: MicroBatch) -> Sequence[Batch]:
    """The slices of a micro-batch, in order; of one that is whole, itself."""
    return micro_batch if isinstance(micro_batch, Sequence) else (micro_batch,)


def changed(micro_batch: MicroBatch, change: Callable[[Batch], Batch]) -> MicroBatch:
    """The micro-batch with every slice changed, when it is asked for."""
    return Slices(micro_batch, change) if isinstance(micro_batch, Sequence) else change(micro_batch)
