"""One pass over a corpus as a virtual stream of tokens: the token at any position is found by arithmetic.

The documents of a pass are put in the order of a keyed permutation and laid end to end. Sequences are cut from that
stream at multiples of L. Only two arrays exist in memory, the order and the running sum of lengths. A binary search
finds a position.

*Joined* documents follow each other token by token, as in the paper. *Isolated* ones are padded to a multiple of the
block, so that each begins at a block boundary, where a model can reset its state exactly. With *best fit* the order is
changed so that sequences cut few documents (`fitting`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipeline.format.extents import extents
from data_pipeline.serve.order.fitting import best_fit
from data_pipeline.serve.order.permutation import Permutation

_BLOCK = 1 << 18  # documents summed at a time, so that ten million documents need no temporary array of that size


class Pieces(NamedTuple):
    """The m runs of tokens that make up some rows, ordered by row and slot. Each run belongs to one document."""

    row: np.ndarray  # (m,) the row of the run
    slot: np.ndarray  # (m,) the position of the run in its row
    length: np.ndarray  # (m,) tokens of the run, at least 1; positions that no run covers are padding
    document: np.ndarray  # (m,) the document's number in the corpus
    offset: np.ndarray  # (m,) the position of the run's first token in its document

    def select(self, which: np.ndarray) -> Pieces:
        """Return the runs that a mask (m,) or an array of indices selects, in the order of the indices."""
        return Pieces(*(values[which] for values in self))

    @staticmethod
    def join(parts: list[tuple[np.ndarray, Pieces]]) -> Pieces:
        """Join sets of runs, each of which covers some of the rows: (the numbers of these rows, the runs)."""
        if len(parts) == 1:
            return parts[0][1]
        rows = [numbers[pieces.row] for numbers, pieces in parts]
        others = zip(*(pieces[1:] for _, pieces in parts), strict=True)
        joined = Pieces(np.concatenate(rows), *map(np.concatenate, others))
        return joined.select(np.argsort(joined.row, kind="stable"))


def inputs(total: int, block: int | None) -> int:
    """Return how many positions of a stream are inputs.

    All are, except the last position of a joined stream, which is only a label.
    """
    return total if block is not None else total - 1


class TokenStream:
    """The stream of one pass.

    Args:
        lengths: (n,) tokens of each document of the corpus.
        block: W for isolated documents; None otherwise.
        key: purpose and numbers that key the permutation of documents (`permutation.key_words`).
        fit: the length of a sequence, and the rest of the first one; None: documents stay in permuted order.
    """

    def __init__(
        self, lengths: np.ndarray, block: int | None, key: tuple[str | int, ...], fit: tuple[int, int] | None = None
    ) -> None:
        self._lengths = lengths
        self._block = block
        count = len(lengths)
        self._order = Permutation(count, *key).all(np.uint32 if count < 1 << 32 else np.int64)
        if fit is not None:
            self._order = self._order[best_fit(extents(lengths[self._order], block), *fit)]
        self._ends = np.empty(count, np.int64)
        end = 0
        for begin in range(0, count, _BLOCK):
            ends = self._ends[begin : begin + _BLOCK]
            np.cumsum(extents(lengths[self._order[begin : begin + _BLOCK]], block), out=ends, dtype=np.int64)
            ends += end
            end = int(ends[-1])
        self.total = end

    @property
    def sizes(self) -> np.ndarray:
        """(n,) int64: the stream positions of each document, in the order of the stream."""
        return np.diff(self._ends, prepend=0)

    def _places(self, positions: np.ndarray) -> np.ndarray:
        """Return the places, in the permuted order, of the documents that cover these positions (n,)."""
        order = np.argsort(positions)
        found = np.empty_like(positions)
        found[order] = np.searchsorted(self._ends, positions[order], side="right")  # fast for sorted positions
        return found

    def pieces(self, starts: np.ndarray, count: int) -> Pieces:
        """Return the runs that make up rows of `count` stream positions; row i begins at position ``starts[i]``.

        No run covers the positions past the end of the stream, nor the padding of isolated documents.
        """
        starts = np.asarray(starts, np.int64)
        stops = np.minimum(starts + count, self.total)
        first, last = self._places(starts), self._places(stops - 1)
        runs = np.where(stops > starts, last - first + 1, 0)
        row = np.repeat(np.arange(len(starts)), runs)
        place = np.arange(len(row)) - np.repeat(np.cumsum(runs) - runs, runs) + first[row]  # in the permuted order
        document = self._order[place].astype(np.int64)
        lengths = self._lengths[document].astype(np.int64)
        begin = self._ends[place] - extents(lengths, self._block)
        low = np.maximum(starts[row], begin)
        high = np.minimum(stops[row], begin + lengths)
        pieces = Pieces(row, low - starts[row], high - low, document, low - begin)
        real = pieces.length > 0  # false where a row begins in a document's padding, and for an empty document
        return pieces if real.all() else pieces.select(real)
