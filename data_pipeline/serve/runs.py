"""Copies many runs of tokens at once out of mapped shards, and compares them with their CRCs.

A row of short documents consists of a dozen runs. The Python overhead of one run is larger than its copy. So all is
done for many rows together: locating the runs, finding the blocks that are still unchecked, and one call to the kernel
for the bytes. This module only detects that something is wrong. `rows` then reads run by run through `shard_reader`,
which finds the damage and names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from data_pipeline.format.shards import CRC_BLOCK
from data_pipeline.serve.layout import DocumentLayout, Found
from data_pipeline.serve.order.stream import Pieces
from data_pipeline.serve.reader import Corpus
from data_pipeline.store.mapped import Collector, MappedFile

_CHECKED_TOGETHER = 20  # log2 of the bytes that are checked at once, about: 1 MiB stays in the processor's cache


class _Blocks(NamedTuple):
    """The blocks that m runs touch, in shards that were opened together."""

    corpus: Corpus
    layout: DocumentLayout
    shards: np.ndarray  # (m,)
    packed: np.ndarray  # (m,) bool
    inside: np.ndarray  # (m,) the number of the run's first block within its document or packed file
    first: np.ndarray  # (m,) the place of that block in the layout
    count: np.ndarray  # (m,) how many blocks the run touches
    address: np.ndarray  # (m,) the memory address where the first block begins
    stop: np.ndarray  # (m,) the memory address where the document or packed file ends

    def unchecked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (places in the layout, addresses, sizes in bytes) of the unverified blocks, each block once."""
        verified = self.layout.verified[self.first]
        for more in range(1, int(self.count.max(initial=0))):
            verified &= self.layout.verified[self.first + np.minimum(more, self.count - 1)]
        runs = np.flatnonzero(~verified)
        count = self.count[runs]
        run = np.repeat(runs, count)
        more = _numbered(count)
        place, once = np.unique(self.first[run] + more, return_index=True)
        run, step = run[once], CRC_BLOCK * self.corpus.dtype.itemsize
        begin = self.address[run] + more[once] * step
        return place, begin, np.minimum(step, self.stop[run] - begin)


class MappedRuns:
    """The m runs of some rows, in mapped shards.

    Args:
        corpora: of the mixture.
        corpus: (rows,) which corpus each row reads.
        pieces: the runs.
        dtype: of the tokens.
    """

    def __init__(self, corpora: Sequence[Corpus], corpus: np.ndarray, pieces: Pieces, dtype: np.dtype) -> None:
        self._pieces, self._dtype = pieces, dtype
        self._size, self._offset = pieces.length * dtype.itemsize, pieces.offset * dtype.itemsize
        self._source = np.zeros_like(self._size)  # (m,) address of the run's first token; 0 if it is not mapped
        self._blocks: list[_Blocks] = []
        self._files: list[MappedFile] = []  # references that keep the files mapped as long as this object lives
        for number in np.unique(corpus).tolist():
            own = np.flatnonzero(corpus[pieces.row] == number)
            for found in corpora[number].find(pieces.document[own]):
                self._locate(corpora[number], found._replace(which=own[found.which]))

    def read(self, shape: tuple[int, int], pad_id: int, collector: Collector) -> np.ndarray | None:
        """Return the tokens (b, l + 1), with padding where there is no run.

        Returns None when a run is damaged or cannot be read.
        """
        if not (self._source.all() and all(_are_whole(blocks, collector) for blocks in self._blocks)):
            return None
        tokens = shape[0] * shape[1]
        if self._pieces.length.sum() == tokens:
            data = collector.collect(self._source, self._size)
        else:
            gaps = self._gaps(shape[1], tokens)
            padding = np.full(int(gaps.max()), pad_id, self._dtype)
            sizes = gaps * self._dtype.itemsize
            data = collector.collect(*_alternating(sizes, padding.ctypes.data, self._source, self._size))
        return None if data is None else data.view(self._dtype).reshape(shape)

    def examine(self) -> None:
        """Check the packed files that the runs lie in.

        It is called after `read` failed because of a packed file or a tar.
        """
        for own in self._blocks:
            for shard in np.unique(own.shards[own.packed]).tolist():
                here = own.packed & (own.shards == shard)
                touched = np.repeat(own.inside[here], own.count[here]) + _numbered(own.count[here])
                own.corpus.examine_packed(shard, np.unique(touched).tolist())

    def _locate(self, corpus: Corpus, found: Found) -> None:
        """Record where the runs of these documents lie, and which blocks they touch."""
        runs, shards, places, firsts, layout = found
        size, packed = self._dtype.itemsize, layout.packed[firsts]
        begin = layout.offsets[places].astype(np.int64)
        origin = np.where(packed, 0, begin)  # the byte from which blocks are counted
        counting = np.where(packed, firsts, places)  # in a packed file, all documents have `crc_starts` of the first
        counted = np.where(packed, corpus.shard_tokens()[shards], layout.lengths[counting].astype(np.int64)) * size
        byte, step = begin + self._offset[runs], CRC_BLOCK * size
        inside, last = (byte - origin) // step, (byte - origin + self._size[runs] - 1) // step
        address, end = self._mapped(corpus, shards * 2 + packed)
        self._source[runs] = np.where(origin + counted <= end, address + byte, 0)
        origin += address
        first = layout.crc_starts[counting] + inside
        blocks = (inside, first, last - inside + 1, origin + inside * step, origin + counted)
        self._blocks.append(_Blocks(corpus, layout, shards, packed, *blocks))

    def _gaps(self, row_tokens: int, tokens: int) -> np.ndarray:
        """Return (m + 1,): the number of tokens that no run covers before, between and after the runs."""
        row, slot, length = self._pieces[:3]
        begin = row * row_tokens + slot
        return np.append(begin, tokens) - np.append(0, begin + length)

    def _mapped(self, corpus: Corpus, files: np.ndarray) -> np.ndarray:
        """Return (2, m): the address and the size in bytes of each file (m,); 0 for a file that is not mapped.

        A file's number is twice its shard's, plus one for the packed file.
        """
        low = int(files.min())
        found = np.zeros((int(files.max()) - low + 1, 2), np.int64)
        for number in (np.flatnonzero(np.bincount(files - low)) + low).tolist():
            if file := corpus.mapped(number >> 1, bool(number & 1)):
                found[number - low] = file.address, file.size
                self._files.append(file)
        return found.take(files - low, axis=0).T


def _are_whole(blocks: _Blocks, collector: Collector) -> bool:
    """Compare the unverified blocks with their CRCs; return whether all of them are intact."""
    place, address, size = blocks.unchecked()
    if not len(place):
        return True
    group = np.cumsum(size) >> _CHECKED_TOGETHER
    for low, high in pairwise([0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(place)]):
        found = _crcs(collector.collect(address[low:high], size[low:high]), size[low:high])
        if found is None:
            return False
        good = found == blocks.layout.crc[place[low:high]]
        blocks.layout.verified[place[low:high]] = good
        if not good.all():
            return False
    return True


def _crcs(data: np.ndarray | None, size: np.ndarray) -> np.ndarray | None:
    """Return the CRC of each block; `data` holds the blocks one after the other."""
    if data is None:
        return None
    blocks = memoryview(data)
    return np.array([isal_zlib.crc32(blocks[begin:end]) for begin, end in pairwise([0, *np.cumsum(size).tolist()])])


def _numbered(counts: np.ndarray) -> np.ndarray:
    """Return 0, 1, …, count - 1 for each of the counts (m,), one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _alternating(
    gaps: np.ndarray, padding: int, source: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (addresses, sizes) of m runs and of the m + 1 gaps around them.

    Gaps are filled from the address `padding`.
    """
    filled = np.empty((2, len(gaps), 2), np.int64)
    filled[0, :, 0], filled[1, :, 0] = padding, gaps
    filled[0, :-1, 1], filled[1, :-1, 1] = source, sizes
    return filled[0].reshape(-1)[:-1], filled[1].reshape(-1)[:-1]
