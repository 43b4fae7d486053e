"""Documents that begin at any token: intra-document masking of a stream that nothing is padded in.

No token sees another document's tokens, exactly, though borders fall anywhere in a block or a chunk of the SSM.
Attention hides keys by the number of their document. A structured SSM works chunk by chunk, and three things make it
exact (Q tokens in a chunk):

- the state behind a chunk is made of the chunk's last document alone, and the state before the chunk goes no further
  where a document begins in it: one elementwise mask, and the same scan;
- the state before a chunk is read by the tokens before its first border alone;
- inside a chunk the causal Q x Q product is made once a document: each border adds one *column*, the chunk with all
  other documents' tokens zero. Every token takes its output from its own document's column.

So a border costs as much of those products as a chunk does, wherever in the chunk it falls.

Shapes: B rows, l tokens, J = B l / Q chunks of all rows, E columns for borders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bst_dist.parallel.sequence.past import Past

SHARES = (512, 128, 32)
"""One border in so many tokens of a micro-batch is the room there is for them: the first that holds them all, else one
for each token. Few sizes, because a compiled layer has a graph for each."""


@dataclass(frozen=True, eq=False)
class Borders:
    """Where documents begin in a slice of whole blocks."""

    begins: Tensor
    """(B, l) bool: the token is its document's first."""
    places: Tensor
    """(E,) int64, growing: which tokens of all rows, row after row, are; B l where there is no more. E is a size that
    the host chooses, so that nothing waits for the device."""

    @staticmethod
    def of(begins: Tensor) -> Borders:
        """From (B, l) bool on the host."""
        return Borders(begins, torch.from_numpy(places_of(begins.numpy())))

    @staticmethod
    def none(rows: int, length: int) -> Borders:
        """No border in so many tokens."""
        begins = torch.zeros(rows, length, dtype=torch.bool)
        return Borders(begins, torch.full((room(0, begins.numel()),), begins.numel()))

    def without_places(self) -> Borders:
        """For a compiled layer that is given its columns, so that its graph does not depend on their number."""
        return Borders(self.begins, self.places[:0])

    def count(self, unit: int) -> Tensor:
        """(B, l / unit, unit) int32: documents that begin in the token's unit, up to the token."""
        return self.begins.unflatten(1, (-1, unit)).cumsum(2, dtype=torch.int32)

    def within(self, unit: int) -> Tensor:
        """(B, l / unit) bool: whether a document begins in the unit."""
        return self.begins.unflatten(1, (-1, unit)).any(2)

    def last(self, unit: int) -> Tensor:
        """(B, l) bool: whether the token belongs to the last document of its unit."""
        count = self.count(unit)
        return (count == count[..., -1:]).flatten(1)

    def cut_off(self, unit: int) -> Tensor:
        """(B, l) bool: whether a document begins between the unit's begin and the token, or at one of both."""
        return (self.count(unit) > 0).flatten(1)

    def columns(self, chunk: int) -> Columns:
        """The columns of chunks of so many tokens."""
        begins = self.begins.reshape(-1, chunk)
        number = begins.flatten().cumsum(0).view(-1, chunk)  # (J, Q): documents begun in all rows so far
        first = (number[:, :1] - begins[:, :1].long()).expand_as(number)
        chunks, borders = len(number), len(self.places)
        here = torch.arange(chunks, device=number.device)
        source = torch.cat((here, (self.places // chunk).clamp(max=chunks - 1)))
        document = torch.cat((first[:, 0], 1 + torch.arange(borders, device=number.device)))
        kept = number[source] == document.unsqueeze(1)
        return Columns(source, kept, torch.where(number == first, here.unsqueeze(1), chunks + number - 1))


Starts: TypeAlias = Tensor | Borders
"""Where documents begin: the blocks that begin one, (B, l / W) bool; or any tokens."""


class Columns(NamedTuple):
    """J chunks with one document at a time: the first of each chunk, then E later ones."""

    source: Tensor
    """(J + E,) int64: which chunk."""
    kept: Tensor
    """(J + E, Q) bool: which of its tokens are of that document."""
    of_token: Tensor
    """(J, Q) int64: the column of each token."""

    def spread(self, x: Tensor) -> Tensor:
        """Tokens to columns, zero where they are of another document: (J, Q, *) -> (J + E, Q, *)."""
        return _Spread.apply(x, *self)

    def collected(self, x: Tensor) -> Tensor:
        """Each token from its own column: (J + E, Q, *) -> (J, Q, *)."""
        return _Collect.apply(x, *self)


def columns(starts: Borders, chunk: int, past: Past) -> Columns:
    """Made once a call for all layers with such chunks."""
    return past.once(*columns_asked(starts, chunk))


def columns_asked(starts: Borders, chunk: int) -> tuple:
    """By which name, and how they are made (`Past.once`)."""
    return f"columns: {chunk}", lambda: starts.columns(chunk)


def places_of(begins: np.ndarray) -> np.ndarray:
    """`Borders.places` of (B, l) bool: (E,) int64."""
    found = np.flatnonzero(begins)
    places = np.full(room(len(found), begins.size), begins.size, np.int64)
    places[: len(found)] = found
    return places


def room(borders: int, tokens: int) -> int:
    """How many columns a micro-batch of so many tokens has for so many borders."""
    return next((size for share in SHARES if (size := -(-tokens // share)) >= borders), tokens)


def _spread(x: Tensor, source: Tensor, kept: Tensor) -> Tensor:
    return x[source].masked_fill(~kept.view(*kept.shape, *[1] * (x.dim() - 2)), 0)


def _collect(x: Tensor, of_token: Tensor) -> Tensor:
    return x[of_token, torch.arange(of_token.shape[1], device=x.device)]


class _Spread(torch.autograd.Function):
    """Every token is kept in one column, so the gradient is a look-up as well: no sum by atomics, in no fixed order."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, kept: Tensor, of_token: Tensor) -> Tensor:
        ctx.save_for_backward(of_token)
        return _spread(x, source, kept)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return _collect(gradient, *ctx.saved_tensors), None, None, None


class _Collect(torch.autograd.Function):
    """The transposed map of `_Spread`."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, kept: Tensor, of_token: Tensor) -> Tensor:
        ctx.save_for_backward(source, kept)
        return _collect(x, of_token)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return _spread(gradient, *ctx.saved_tensors), None, None, None
