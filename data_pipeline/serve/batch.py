"""Micro-batches: the tokens of some rows, in the layout that a trainer needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.serve.located_rows import LocatedRows
from data_pipeline.serve.order.stream import Pieces


@dataclass(frozen=True)
class Batch:
    """The slices of b rows that one rank holds, each of l = L / sp tokens; all arrays are contiguous."""

    input_ids: np.ndarray  # (b, l) int64
    labels: np.ndarray  # (b, l) int64: the token after each input, also for the slice's last one; padding where masked
    loss_mask: np.ndarray  # (b, l) bool: false where input or label is padding, or they belong to different documents,
    # unless documents are joined
    starts: np.ndarray | None  # where documents begin: (b, l // W) bool per block for isolated documents, (b, l) bool
    # per token for masked ones, None for joined ones
    continues: np.ndarray  # (b,) bool: the row's first token follows the last token of the row in the step before
    rows: np.ndarray  # (b,) int64: global row numbers; -1 for masked rows, which fill up a micro-batch (`spread`)
    corpora: np.ndarray  # (b,) int64: which corpus of the mixture the row reads
    epochs: np.ndarray  # (b,) int64: which pass over that corpus
    located: LocatedRows  # where the tokens were read from, including the label of the last input
    begin: int  # the position of the slice's first token in its row

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
        cuts = self.cuts
        numbers = np.full(self.input_ids.shape, -1, np.int64)
        first = cuts.row * numbers.shape[1] + cuts.place - self.begin
        inside = np.arange(cuts.count.sum()) - np.repeat(np.cumsum(cuts.count) - cuts.count, cuts.count)
        numbers.reshape(-1)[np.repeat(first, cuts.count) + inside] = np.repeat(cuts.document, cuts.count)
        return numbers


@dataclass(frozen=True)
class Cuts:
    """Which document lies where: m runs of inputs of one document each, ordered by row and place.

    Places count from the start of the whole row, whichever slice the batch holds. A run's document begins at ``place -
    offset``, which is negative when the document began in an earlier sequence.
    """

    row: np.ndarray  # (m,) int64: which row of the batch
    place: np.ndarray  # (m,) int64: the position of the run's first token in the row, in 0..L-1
    count: np.ndarray  # (m,) int64: tokens
    document: np.ndarray  # (m,) int64: the document's number in the corpus
    offset: np.ndarray  # (m,) int64: the position of the run's first token in the document

    @classmethod
    def of(cls, pieces: Pieces, length: int, begin: int) -> Cuts:
        """Return the cuts of a slice of `length` inputs.

        `pieces` also cover the label of the last input, which is left out.
        """
        pieces = pieces.select(pieces.slot < length)
        count = np.minimum(pieces.length, length - pieces.slot)
        return cls(pieces.row, pieces.slot + begin, count, pieces.document, pieces.offset)


def label_mask(real: np.ndarray | None, shape: tuple[int, int], rows: LocatedRows, separate: bool) -> np.ndarray:
    """Return (b, l) bool: which inputs have a label that counts in the loss.

    Args:
        real: (b, l + 1) bool, which tokens are text; None when all are.
        shape: (b, l).
        rows: what the rows read.
        separate: whether documents are separate, so that the last token of one does not predict the first of the next.
    """
    mask = np.ones(shape, bool) if real is None else real[:, :-1] & real[:, 1:]
    if separate:
        pieces = rows.pieces
        first = pieces.select((pieces.offset == 0) & (pieces.slot > 0))
        mask[first.row, first.slot - 1] = False
    return mask


def block_starts(shape: tuple[int, int], pieces: Pieces, block: int) -> np.ndarray:
    """Return (b, l // W) bool: which blocks begin a document. Isolated documents begin at multiples of W."""
    starts = np.zeros((shape[0], shape[1] // block), bool)
    first = pieces.select((pieces.offset == 0) & (pieces.slot < shape[1]))
    starts[first.row, first.slot // block] = True
    return starts


def token_starts(shape: tuple[int, int], pieces: Pieces) -> np.ndarray:
    """Return (b, l) bool: which tokens are the first of their document."""
    return block_starts(shape, pieces, block=1)
