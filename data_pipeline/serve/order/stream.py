"""One pass over a corpus as a virtual stream of tokens: where every position's token lies, by arithmetic.

The documents of a pass are put in the order of a keyed permutation and laid end to end; sequences are cut from that
stream at multiples of L. Nothing of it exists but two arrays, the order and the running sum of lengths, so a position
is found by one binary search.

*Joined* documents follow each other token by token, as in the paper. *Isolated* ones are padded to a multiple of the
block, so that each begins on a block's boundary and a model can reset there exactly. With *best fit* the order is
changed so that sequences cut few documents (`fitting`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipeline.format.extents import extents
from data_pipeline.serve.order.fitting import best_fit
from data_pipeline.serve.order.permutation import Permutation

_BLOCK = 1 << 18  # documents summed at a time, so that a start on ten million needs no temporary of their number


class Pieces(NamedTuple):
    """Runs of tokens of one document each that together make up some rows; m runs, ordered by row and slot."""

    row: np.ndarray  # (m,) which row
    slot: np.ndarray  # (m,) where in the row the run goes
    length: np.ndarray  # (m,) tokens in it, at least 1; padding is what no run covers
    document: np.ndarray  # (m,) the document's number in the corpus
    offset: np.ndarray  # (m,) the first token's place in its document

    def select(self, which: np.ndarray) -> Pieces:
        """The runs that a mask (m,) or an order of indices picks."""
        return Pieces(*(values[which] for values in self))

    @staticmethod
    def join(parts: list[tuple[np.ndarray, Pieces]]) -> Pieces:
        """One set of runs out of several, each of which has some of the rows: (their numbers, the runs)."""
        if len(parts) == 1:
            return parts[0][1]
        rows = [numbers[pieces.row] for numbers, pieces in parts]
        others = zip(*(pieces[1:] for _, pieces in parts), strict=True)
        joined = Pieces(np.concatenate(rows), *map(np.concatenate, others))
        return joined.select(np.argsort(joined.row, kind="stable"))


def inputs(total: int, block: int | None) -> int:
    """Positions of a stream of `total` that are an input: all, but for the last of a joined one, which only labels."""
    return total if block is not None else total - 1


class TokenStream:
    """The stream of one pass.

    Args:
        lengths: (n,) tokens of each document of the corpus.
        block: W where documents are isolated; None where they are joined.
        key: purpose and numbers that key the permutation of documents (`permutation.key_words`).
        fit: the length of a sequence, and what the first has left; None: documents stay as they are permuted.
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
        """(n,) int64: what each document takes up, in the order of the stream."""
        return np.diff(self._ends, prepend=0)

    def _places(self, positions: np.ndarray) -> np.ndarray:
        """Where in the order the documents are that cover these positions (n,)."""
        order, found = np.argsort(positions), np.empty_like(positions)
        found[order] = np.searchsorted(self._ends, positions[order], side="right")  # fast, since they are in order
        return found

    def pieces(self, starts: np.ndarray, count: int) -> Pieces:
        """The runs that make up rows of `count` stream positions, row i from position ``starts[i]``.

        Positions past the end of the stream are covered by no run, nor is the padding of isolated documents.
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
        real = pieces.length > 0  # all of them, but where a row begins in a document's padding or a document is empty
        return pieces if real.all() else pieces.select(real)
