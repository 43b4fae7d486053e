"""One rank's share of every step: which rows, and which part of each slice of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from data_pipeline.serve.slices import MicroBatch, Slices

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What all loaders are told of a step's size and of the rank that they serve."""

    length: int
    """L, tokens of a row."""
    rows: int
    """G, rows of a step over all ranks."""
    micro_rows: int
    """Rows of a micro-batch of one rank; G is a multiple of dp * micro_rows."""
    dp_rank: int = 0
    dp: int = 1
    sp_rank: int = 0
    sp: int = 1
    slice_tokens: int | None = None
    """Tokens of a slice, over all ranks that share it; None: a row is one slice."""

    @property
    def own(self) -> range:
        """The global numbers of this rank's rows."""
        return range(self.dp_rank * self.rows // self.dp, (self.dp_rank + 1) * self.rows // self.dp)

    @property
    def tokens(self) -> int:
        """Tokens of a slice that this rank holds."""
        return (self.slice_tokens or self.length) // self.sp

    @property
    def begins(self) -> range:
        """Where this rank's part of each slice begins in a row."""
        return range(self.sp_rank * self.tokens, self.length, self.slice_tokens or self.length)

    def micro_batches(self) -> Iterator[range]:
        """The rows of each micro-batch."""
        return (range(first, first + self.micro_rows) for first in self.own[:: self.micro_rows])

    def laid_out(self, parts: Sequence[T], lay_out: Callable[[T], Any]) -> MicroBatch:
        """A micro-batch of what is stored for each slice: in slices if the rows are cut into some, else whole."""
        return Slices(parts, lay_out) if self.slice_tokens is not None else lay_out(parts[0])
