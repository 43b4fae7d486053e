"""One rank's share of every step: which rows, and which part of each slice of them."""

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
    """What all loaders are told of a step's size and of the rank that they serve."""

    length: int
    """L, tokens of a row."""
    rows: int
    """G, rows of a step over all ranks."""
    micro_rows: int
    """Most rows of a micro-batch of one rank."""
    dp_rank: int = 0
    dp: int = 1
    sp_rank: int = 0
    sp: int = 1
    slice_tokens: int | None = None
    """Tokens of a slice, over all ranks that share it; None: a row is one slice."""

    @cached_property
    def own(self) -> range:
        """The global numbers of this rank's rows; none where there are more ranks than rows."""
        return self._spread.own(self.dp_rank)

    @property
    def tokens(self) -> int:
        """Tokens of a slice that this rank holds."""
        return (self.slice_tokens or self.length) // self.sp

    @cached_property
    def begins(self) -> range:
        """Where this rank's part of each slice begins in a row."""
        return range(self.sp_rank * self.tokens, self.length, self.slice_tokens or self.length)

    @cached_property
    def micro_batches(self) -> list[np.ndarray]:
        """(b,) int64 each: the rows of every micro-batch, masked ones as `spread.MASKED`; not to be changed."""
        return self._spread.of_micro_batches(self.dp_rank)

    def laid_out(self, parts: Sequence[T], lay_out: Callable[[T], Any]) -> MicroBatch:
        """A micro-batch of what is stored for each slice: in slices if the rows are cut into some, else whole."""
        return Slices(parts, lay_out) if self.slice_tokens is not None else lay_out(parts[0])

    @property
    def _spread(self) -> Spread:
        return Spread(self.rows, self.dp, self.micro_rows)
