"""Micro-batches: the tokens of some rows, laid out for a trainer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.serve.located import Rows
from data_pipeline.serve.order.stream import Pieces


@dataclass(frozen=True)
class Batch:
    """b rows, of each the slice of l = L / sp tokens that one rank holds."""

    input_ids: np.ndarray  # (b, l) int64
    labels: np.ndarray  # (b, l) int64: the token after each input, over the slice's end too; padding where masked
    loss_mask: np.ndarray  # (b, l) bool: false where the input or the label is padding, or they are of two documents
    starts: np.ndarray | None  # where a document begins: (b, l // W) bool by block where documents are isolated, (b, l)
    # by token where they are masked; None where they are joined
    continues: np.ndarray  # (b,) bool: the row's first token follows the last one the row was fed the step before
    rows: np.ndarray  # (b,) int64: global row numbers; -1 for masked rows, which fill a micro-batch (`spread`)
    corpora: np.ndarray  # (b,) int64: which corpus of the mixture the row reads
    epochs: np.ndarray  # (b,) int64: which pass over that corpus
    located: Rows  # where the tokens were read, the label of the last input included
    begin: int  # the slice's first token in its row

    @property
    def pieces(self) -> Pieces:
        """The runs of tokens that were read."""
        return self.located.pieces

    @property
    def cuts(self) -> Cuts:
        """Which document lies where in the rows."""
        return Cuts.of(self.pieces, self.input_ids.shape[1], self.begin)

    @property
    def documents(self) -> np.ndarray:
        """(b, l) int64: the number, in its corpus, of the document that each input belongs to; -1 for padding."""
        cuts, numbers = self.cuts, np.full(self.input_ids.shape, -1, np.int64)
        first = cuts.row * numbers.shape[1] + cuts.place - self.begin
        inside = np.arange(cuts.count.sum()) - np.repeat(np.cumsum(cuts.count) - cuts.count, cuts.count)
        numbers.reshape(-1)[np.repeat(first, cuts.count) + inside] = np.repeat(cuts.document, cuts.count)
        return numbers


@dataclass(frozen=True)
class Cuts:
    """Which document lies where: m runs of inputs of one document each, ordered by row and place.

    Places count from the begin of the whole row, of whatever slice the batch holds: a run's document begins at
    ``place - offset``, which is negative where that is in an earlier sequence.
    """

    row: np.ndarray  # (m,) int64: which row of the batch
    place: np.ndarray  # (m,) int64: the run's first token in the row, in 0..L-1
    count: np.ndarray  # (m,) int64: tokens
    document: np.ndarray  # (m,) int64: the document's number in the corpus
    offset: np.ndarray  # (m,) int64: the run's first token in the document

    @classmethod
    def of(cls, pieces: Pieces, length: int, begin: int) -> Cuts:
        """The cuts of a slice of `length` inputs; the runs also cover the label of the last."""
        pieces = pieces.select(pieces.slot < length)
        count = np.minimum(pieces.length, length - pieces.slot)
        return cls(pieces.row, pieces.slot + begin, count, pieces.document, pieces.offset)


def label_mask(real: np.ndarray | None, shape: tuple[int, int], rows: Rows, apart: bool) -> np.ndarray:
    """(b, l) bool: which inputs have a label to learn.

    Args:
        real: (b, l + 1) which tokens are text; None when all are.
        shape: (b, l).
        rows: what they read.
        apart: whether documents do not see each other, so that none predicts the next one's first token.
    """
    mask = np.ones(shape, bool) if real is None else real[:, :-1] & real[:, 1:]
    if apart:
        pieces = rows.pieces
        first = pieces.select((pieces.offset == 0) & (pieces.slot > 0))
        mask[first.row, first.slot - 1] = False
    return mask


def block_starts(shape: tuple[int, int], pieces: Pieces, block: int) -> np.ndarray:
    """(b, l // W) bool: which blocks begin a document; isolated documents begin at multiples of W."""
    starts = np.zeros((shape[0], shape[1] // block), bool)
    first = pieces.select((pieces.offset == 0) & (pieces.slot < shape[1]))
    starts[first.row, first.slot // block] = True
    return starts


def token_starts(shape: tuple[int, int], pieces: Pieces) -> np.ndarray:
    """(b, l) bool: which tokens are their document's first."""
    return block_starts(shape, pieces, block=1)
