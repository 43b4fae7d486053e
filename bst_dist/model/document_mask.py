"""Documents that begin at any token: intra-document masking of a stream without padding.

No token sees another document's tokens, exactly, although borders may be anywhere in a block or in a chunk of the SSM.
Attention hides keys by the number of their document. A structured SSM works chunk by chunk, and three rules make it
exact (Q tokens in a chunk):

- the state after a chunk comes from the chunk's last document only, and the state before a chunk is not passed on if a
  document begins in the chunk: one elementwise mask, and the same scan;
- only the tokens before a chunk's first border read the state before the chunk;
- inside a chunk the causal Q x Q product is computed once per document: each border adds one *column*, the chunk with
  the tokens of all other documents set to zero. Each token takes its output from the column of its own document.

So a border costs as much of these products as a chunk does, wherever in the chunk it is.

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
"""A micro-batch has one column for borders per this many tokens: the first number here that gives enough columns, else
one column per token. The sizes are few, because a compiled layer has one graph for each."""


@dataclass(frozen=True, eq=False)
class Borders:
    """Where documents begin in a slice of whole blocks."""

    begins: Tensor
    """(B, l) bool: the token is the first of its document."""
    places: Tensor
    """(E,) int64, ascending: the indices of these tokens in all rows, row after row; unused entries are B l. The host
    chooses the size E, so that nothing waits for the device."""

    @staticmethod
    def of(begins: Tensor) -> Borders:
        """Return the borders of (B, l) bool on the host."""
        return Borders(begins, torch.from_numpy(places_of(begins.numpy())))

    @staticmethod
    def none(rows: int, length: int) -> Borders:
        """Return the borders of a micro-batch in which no document begins."""
        begins = torch.zeros(rows, length, dtype=torch.bool)
        return Borders(begins, torch.full((room(0, begins.numel()),), begins.numel()))

    def without_places(self) -> Borders:
        """Return the borders without places, for a compiled layer that gets its columns as input.

        The layer's graph then does not depend on the number of places.
        """
        return Borders(self.begins, self.places[:0])

    def count(self, unit: int) -> Tensor:
        """Return how many documents begin in the token's unit up to the token, (B, l / unit, unit) int32."""
        return self.begins.unflatten(1, (-1, unit)).cumsum(2, dtype=torch.int32)

    def within(self, unit: int) -> Tensor:
        """Return whether a document begins in each unit, (B, l / unit) bool."""
        return self.begins.unflatten(1, (-1, unit)).any(2)

    def last(self, unit: int) -> Tensor:
        """Return whether each token belongs to the last document of its unit, (B, l) bool."""
        count = self.count(unit)
        return (count == count[..., -1:]).flatten(1)

    def cut_off(self, unit: int) -> Tensor:
        """Return whether a document begins between the unit's first token and the token, inclusive, (B, l) bool."""
        return (self.count(unit) > 0).flatten(1)

    def columns(self, chunk: int) -> Columns:
        """Return the columns of chunks of `chunk` tokens."""
        begins = self.begins.reshape(-1, chunk)
        number = begins.flatten().cumsum(0).view(-1, chunk)  # (J, Q): documents begun so far, over all rows
        first = (number[:, :1] - begins[:, :1].long()).expand_as(number)
        chunks, borders = len(number), len(self.places)
        here = torch.arange(chunks, device=number.device)
        source = torch.cat((here, (self.places // chunk).clamp(max=chunks - 1)))
        document = torch.cat((first[:, 0], 1 + torch.arange(borders, device=number.device)))
        kept = number[source] == document.unsqueeze(1)
        return Columns(source, kept, torch.where(number == first, here.unsqueeze(1), chunks + number - 1))


Starts: TypeAlias = Tensor | Borders
"""Where documents begin: (B, l / W) bool for blocks that begin one, or `Borders` for documents that begin anywhere."""


class Columns(NamedTuple):
    """J chunks with one document at a time: first the first document of each chunk, then E later ones."""

    source: Tensor
    """(J + E,) int64: the chunk of each column."""
    kept: Tensor
    """(J + E, Q) bool: which tokens of the chunk belong to the column's document."""
    of_token: Tensor
    """(J, Q) int64: the column of each token."""

    def spread(self, x: Tensor) -> Tensor:
        """Copy tokens to columns, with zeros for tokens of other documents: (J, Q, *) -> (J + E, Q, *)."""
        return _Spread.apply(x, *self)

    def collected(self, x: Tensor) -> Tensor:
        """Take each token from its own column: (J + E, Q, *) -> (J, Q, *)."""
        return _Collect.apply(x, *self)


def columns(starts: Borders, chunk: int, past: Past) -> Columns:
    """Return the columns, made once per call for all layers with this chunk."""
    return past.once(f"columns: {chunk}", lambda: starts.columns(chunk))


def places_of(begins: np.ndarray) -> np.ndarray:
    """Return `Borders.places` of (B, l) bool: (E,) int64."""
    found = np.flatnonzero(begins)
    places = np.full(room(len(found), begins.size), begins.size, np.int64)
    places[: len(found)] = found
    return places


def room(borders: int, tokens: int) -> int:
    """Return the number of columns for this many borders in a micro-batch of this many tokens."""
    for share in SHARES:
        count = -(-tokens // share)
        if count >= borders:
            return count
    return tokens


def _spread(x: Tensor, source: Tensor, kept: Tensor) -> Tensor:
    return x[source].masked_fill(~kept.view(*kept.shape, *[1] * (x.dim() - 2)), 0)


def _collect(x: Tensor, of_token: Tensor) -> Tensor:
    return x[of_token, torch.arange(of_token.shape[1], device=x.device)]


class _Spread(torch.autograd.Function):
    """Tokens to columns. Each token is kept in one column only, so the gradient is a look-up too.

    It needs no sum by atomics, whose order is not fixed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, kept: Tensor, of_token: Tensor) -> Tensor:
        ctx.save_for_backward(of_token)
        return _spread(x, source, kept)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return _collect(gradient, *ctx.saved_tensors), None, None, None


class _Collect(torch.autograd.Function):
    """Columns to tokens, the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, kept: Tensor, of_token: Tensor) -> Tensor:
        ctx.save_for_backward(source, kept)
        return _collect(x, of_token)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return _spread(gradient, *ctx.saved_tensors), None, None, None
