"""The share of one rank in every step: which rows, and which part of each slice of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from data_pipeline.serve.slices import MicroBatch, Slices
from data_pipeline.serve.spread import Spread

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Share:
    """The sizes of a step, and the rank that a loader serves. All kinds of loaders take it."""

    length: int
    """L, tokens of a row."""
    rows: int
    """G, rows of a step over all ranks."""
    micro_rows: int
    """Maximum number of rows in a micro-batch of one rank."""
    dp_rank: int = 0
    dp: int = 1
    sp_rank: int = 0
    sp: int = 1
    slice_tokens: int | None = None
    """Tokens of a slice, over all ranks that share it. None: a row is one slice."""

    @cached_property
    def row_numbers(self) -> range:
        """The global numbers of this rank's rows; empty for some ranks when there are more ranks than rows."""
        return self._spread.rows_of(self.dp_rank)

    @property
    def tokens(self) -> int:
        """Tokens of a slice that this rank holds."""
        return (self.slice_tokens or self.length) // self.sp

    @cached_property
    def begins(self) -> range:
        """The positions in a row where this rank's part of each slice begins."""
        return range(self.sp_rank * self.tokens, self.length, self.slice_tokens or self.length)

    @cached_property
    def micro_batches(self) -> list[np.ndarray]:
        """The rows of each micro-batch, (b,) int64 each; `spread.MASKED` for masked rows.

        The caller must not change them.
        """
        return self._spread.of_micro_batches(self.dp_rank)

    def laid_out(self, parts: Sequence[T], lay_out: Callable[[T], Any]) -> MicroBatch:
        """Return a micro-batch from the stored part of each slice: `Slices` if rows are cut into slices, else whole."""
        return Slices(parts, lay_out) if self.slice_tokens is not None else lay_out(parts[0])

    @property
    def _spread(self) -> Spread:
        return Spread(self.rows, self.dp, self.micro_rows)
