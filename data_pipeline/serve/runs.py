"""Many runs of tokens at a time, copied out of mapped shards and compared with their CRCs.

Rows of short documents are made of a dozen runs each. What Python does for one of them takes longer than its copy, so
all is done for many rows together: where the runs lie, which of their blocks have not been checked yet, and one call to
the kernel for the bytes. Anything that is not as it should be is only noticed here: `rows` then reads run by run,
through `shard_reader`, which finds and names it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from isal import isal_zlib

from data_pipeline.format.shards import CRC_BLOCK
from data_pipeline.serve.layout import Found, Layout
from data_pipeline.serve.order.stream import Pieces
from data_pipeline.serve.reader import Corpus
from data_pipeline.store.mapped import Collector, MappedFile


class MappedRuns:
    """The m runs of some rows, in shards that are mapped.

    Args:
        corpora: of the mixture.
        corpus: (m,) which of them each run lies in.
        pieces: the runs.
        dtype: of the tokens.
    """

    def __init__(self, corpora: Sequence[Corpus], corpus: np.ndarray, pieces: Pieces, dtype: np.dtype) -> None:
        self._pieces, self._dtype = pieces, dtype
        first, last = pieces.offset // CRC_BLOCK, (pieces.offset + pieces.length - 1) // CRC_BLOCK
        self._blocks = last - first + 1  # (m,) how many the run touches
        self._before = pieces.offset - first * CRC_BLOCK  # (m,) tokens of the first of them that the run leaves out
        self._block = np.empty_like(first)  # (m,) the place of the first in its layout
        self._span = np.empty_like(first)  # (m,) tokens of all of them
        self._source = np.zeros_like(first)  # (m,) address of the run's first token; 0 where it is not mapped
        self._of = np.empty_like(first)  # (m,) which of the layouts that is
        self._layouts: list[tuple[np.ndarray, Layout]] = []  # (runs, what their blocks are compared with)
        self._files: list[MappedFile | None] = []  # which stay mapped as long as this is there
        for number in np.unique(corpus).tolist():
            own = np.flatnonzero(corpus == number)
            for found in corpora[number].find(pieces.document[own]):
                self._locate(corpora[number], found._replace(which=own[found.which]))

    def read(self, tokens: np.ndarray, pad_id: int, collector: Collector) -> bool:
        """Fill `tokens` (b, l + 1), with padding where no run comes; false when any run is damaged or cannot be read,
        and then they are undefined."""
        if not self._source.all():
            return False
        size, (row, slot, length, _, _) = self._dtype.itemsize, self._pieces
        begin = (row * tokens.shape[1] + slot) * size
        unchecked = self._unchecked()
        apart = unchecked[self._span[unchecked] != length[unchecked]]  # of these, a row holds a part of a block
        gaps = np.append(begin, tokens.nbytes) - np.append(0, begin + length * size)
        padding = np.full(int(gaps.max()) // size, pad_id, self._dtype)
        source, count = _alternating(gaps, padding.ctypes.data, self._source, length * size)
        blocks = self._source[apart] - self._before[apart] * size
        data = collector.collect(np.concatenate([source, blocks]), np.concatenate([count, self._span[apart] * size]))
        if data is None:
            return False
        ends = np.cumsum(self._span[apart]) * size
        begin[apart] = tokens.nbytes + ends - self._span[apart] * size  # where their blocks are whole
        if not self._are_whole(unchecked, data, begin):
            return False
        tokens.reshape(-1).view(np.uint8)[:] = data[: tokens.nbytes]
        return True

    def _locate(self, corpus: Corpus, found: Found) -> None:
        """Note where the runs of these documents lie."""
        runs, shards, places, layout = found
        size, offset = self._dtype.itemsize, self._pieces.offset[runs]
        begin = offset - self._before[runs]
        self._block[runs] = layout.crc_starts[places] + begin // CRC_BLOCK
        stop = np.minimum(begin + self._blocks[runs] * CRC_BLOCK, layout.lengths[places].astype(np.int64))
        self._span[runs] = stop - begin
        each, which = np.unique(shards, return_inverse=True)
        files = [corpus.mapped(shard) for shard in each.tolist()]
        address, end = np.array([(file.address, file.size) if file else (0, 0) for file in files]).T
        byte = layout.offsets[places].astype(np.int64)
        self._source[runs] = np.where(byte + stop * size <= end[which], address[which] + byte + offset * size, 0)
        self._of[runs] = len(self._layouts)
        self._layouts.append((runs, layout))
        self._files += files

    def _unchecked(self) -> np.ndarray:
        """The runs that touch a block which has not been found whole."""
        verified = np.ones(len(self._blocks), bool)
        for runs, layout in self._layouts:
            for more in range(int(self._blocks[runs].max(initial=0))):
                verified[runs] &= layout.verified[self._block[runs] + np.minimum(more, self._blocks[runs] - 1)]
        return np.flatnonzero(~verified)

    def _are_whole(self, runs: np.ndarray, data: np.ndarray, begin: np.ndarray) -> bool:
        """Compare the blocks of some runs with their CRCs; those of each lie together, from byte `begin` of `data` on.

        Good ones count as verified.
        """
        count = self._blocks[runs]
        inside = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        step, size = CRC_BLOCK * self._dtype.itemsize, self._dtype.itemsize
        start = np.repeat(begin[runs], count) + inside * step
        stop = np.minimum(start + step, np.repeat(begin[runs] + self._span[runs] * size, count))
        parts = map(memoryview(data).__getitem__, map(slice, start.tolist(), stop.tolist()))
        found = np.fromiter(map(isal_zlib.crc32, parts), np.uint32, len(start))
        block, of = np.repeat(self._block[runs], count) + inside, np.repeat(self._of[runs], count)
        for number, (_, layout) in enumerate(self._layouts):
            own = slice(None) if len(self._layouts) == 1 else of == number
            layout.verified[block[own]] = good = found[own] == layout.crc[block[own]]
            if not good.all():
                return False
        return True


def _alternating(
    gaps: np.ndarray, padding: int, source: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(addresses, sizes) of m runs and of the m + 1 gaps around them, which are filled from the address `padding`."""
    if not gaps.any():
        return source, sizes
    filled = np.empty((2, len(gaps), 2), np.int64)
    filled[0, :, 0], filled[1, :, 0] = padding, gaps
    filled[0, :-1, 1], filled[1, :-1, 1] = source, sizes
    return filled[0].reshape(-1)[:-1], filled[1].reshape(-1)[:-1]
