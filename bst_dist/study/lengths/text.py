"""The text on which all lengths are measured: stretches of equal length.

Every length is measured on the same tokens, so that lengths differ only in how far back the model sees. A stretch has
as many tokens as the longest requested length, and sequences of shorter lengths are pieces of it.

*Joined* documents form one stream, as in training, and a stretch is any part of this stream. *Isolated* documents are
read separately, and only documents with at least one stretch are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.order.permutation import Permutation
from data_pipeline.serve.order.stream import TokenStream
from data_pipeline.serve.reader import Corpus

ORDER = ("documents", 0, 0, 0)
"""Key of the order in which documents are read, the same as for evaluation in training."""


class TooShortError(UserError):
    """The corpus has too little text for the length."""


class Stretches(ABC):
    """Stretches of `length` + 1 tokens. The first token is only input, each other token is predicted once."""

    def __init__(self, corpus: Corpus, length: int, count: int, numbers: np.ndarray):
        self.corpus, self.length, self.count = corpus, length, count
        self.numbers = numbers
        """(n,) indices of the documents that are read, in increasing order."""

    @abstractmethod
    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start:stop`` of a stretch (here called `document`), in the corpus's dtype."""

    @abstractmethod
    def documents(self, stretch: int, start: int, stop: int) -> np.ndarray:
        """Return the documents of tokens ``start:stop`` of a stretch, as indices into `numbers`: (stop - start,)."""


class JoinedStretches(Stretches):
    """Stretch k begins at token k `length` of the stream of all documents."""

    def __init__(self, corpus: Corpus, length: int, most: int | None):
        """Prepare at most `most` stretches; raises TooShortError if the stream does not fill one."""
        self._stream = TokenStream(corpus.lengths, None, ORDER)
        count = (self._stream.total - 1) // length
        if not count:
            raise TooShortError(
                f"{corpus.where}: all its documents together have {self._stream.total:,} tokens, fewer than a length "
                f"of {length:,} and one before it: ask for shorter lengths, or prepare more text"
            )
        count = count if most is None else min(count, most)
        read = self._stream.pieces(np.array([1]), count * length).document
        super().__init__(corpus, length, count, np.unique(read))

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        pieces = self._pieces(document, start, stop)
        runs = zip(*(column.tolist() for column in (pieces.document, pieces.offset, pieces.length)), strict=True)
        return np.concatenate([self.corpus.tokens(number, at, at + count) for number, at, count in runs])

    def documents(self, stretch: int, start: int, stop: int) -> np.ndarray:
        pieces = self._pieces(stretch, start, stop)
        return np.repeat(np.searchsorted(self.numbers, pieces.document), pieces.length)

    def _pieces(self, stretch: int, start: int, stop: int):
        return self._stream.pieces(np.array([stretch * self.length + start]), stop - start)


class IsolatedStretches(Stretches):
    """The whole stretches of each document, from its beginning. The rest of a document is not read."""

    def __init__(self, corpus: Corpus, length: int, most: int | None):
        """Prepare at most `most` stretches; raises TooShortError if no document fills one."""
        whole = (corpus.lengths.astype(np.int64) - 1) // length  # (documents,)
        if not whole.any():
            raise TooShortError(
                f"{corpus.where}: its longest document has {int(corpus.lengths.max()):,} tokens, fewer than a length "
                f"of {length:,} and one before it, and this model reads each document by itself: ask for shorter "
                "lengths, or take a corpus of longer documents (--corpus)"
            )
        order = Permutation(len(whole), *ORDER).all()
        self._document = np.repeat(order, whole[order])[:most]
        self._start = np.concatenate([np.arange(n) for n in whole[order] if n])[:most] * length
        super().__init__(corpus, length, len(self._document), np.unique(self._document))

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        begin = int(self._start[document])
        return self.corpus.tokens(int(self._document[document]), begin + start, begin + stop)

    def documents(self, stretch: int, start: int, stop: int) -> np.ndarray:
        return np.full(stop - start, np.searchsorted(self.numbers, self._document[stretch]))


def open_stretches(corpus: Corpus, length: int, isolated: bool, tokens: int | None = None) -> Stretches:
    """Return at most `tokens` tokens of text for lengths up to `length`; raises TooShortError if the text is short."""
    if tokens is not None and tokens < length:
        raise TooShortError(
            f"the limit of {tokens:,} tokens to read is less than the longest length, {length:,}: raise it (--tokens; "
            "measure.tokens in an experiment), or ask for shorter lengths"
        )
    return (IsolatedStretches if isolated else JoinedStretches)(corpus, length, tokens and tokens // length)


def longest(corpus: Corpus, isolated: bool) -> int:
    """Return the longest length that the corpus has enough text for."""
    return int(corpus.lengths.max() if isolated else corpus.tokens_total) - 1
