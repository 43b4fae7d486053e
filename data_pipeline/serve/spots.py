"""Whole short documents, many at a time: read and compared with their CRCs at little work for each.

A row of short documents is read at many places, and what one read costs (a call of Python, one of the kernel) is more
than its bytes do. So where the documents lie is worked out for many rows together, and one call, `pwritev`, has the
kernel copy all those of a batch from their mapped files into memory of this process. A document here is one block of
its index; it is read and checked whole at each use.

Nothing but the kernel reads from the maps. A page that cannot be read would kill a process that touches it (SIGBUS);
the kernel's copy of it fails instead, and the document is then read in the other way, which names what is wrong.
"""

from __future__ import annotations

import mmap
import os
import threading
from io import FileIO
from itertools import islice
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from data_pipeline.serve.order.stream import Pieces

AVAILABLE = hasattr(os, "memfd_create")  # Linux
_AT_ONCE = 1024  # pieces of one call; what Linux takes


class Spots(NamedTuple):
    """Where documents lie in their files; m documents."""

    file: np.ndarray  # (m,) int64: a number that the caller gives the file
    begin: np.ndarray  # (m,) int64: byte of the file
    size: np.ndarray  # (m,) int64: bytes; 0 for what is to be read in another way
    crc: np.ndarray  # (m,) int64

    @classmethod
    def nowhere(cls, count: int) -> Spots:
        """So many documents that are all to be read in another way."""
        return cls(*(np.zeros(count, np.int64) for _ in cls._fields))


class ShortRuns:
    """The runs of some rows that lie in short documents, laid out once for all of them.

    Args:
        spots: where the documents of the runs lie, (m,).
        pieces: the runs, in order; m.
        rows: how many rows they make up.
        row_bytes: of a row.
        itemsize: bytes of a token.
        maps: the files by number.
    """

    def __init__(
        self, spots: Spots, pieces: Pieces, rows: int, row_bytes: int, itemsize: int, maps: dict[int, memoryview]
    ) -> None:
        self.left = spots.size == 0
        """(m,) bool: the runs that are to be read in another way."""
        file, begin, size, crc = (column[~self.left] for column in spots)
        row, slot, length, _, offset = (column[~self.left] * itemsize for column in pieces)
        row //= itemsize
        self._row_bytes, self._crc = row_bytes, crc.tolist()
        where = zip(map(maps.__getitem__, file.tolist()), begin.tolist(), (begin + size).tolist(), strict=True)
        self._documents = [data[first:last] for data, first, last in where]
        bounds = np.searchsorted(row, np.arange(rows + 1))
        stops = np.cumsum(size)
        at = np.append(0, stops)[bounds]  # what the documents of the rows before take up
        stops -= at[row]
        self._bounds, self._at = bounds.tolist(), at.tolist()
        self._slices = list(map(slice, (stops - size).tolist(), stops.tolist()))  # counted from those of their row
        source = stops - size + offset
        apart = (np.diff(row) != 0) | (slot[1:] != (slot + length)[:-1]) | (source[1:] != (source + length)[:-1])
        first = np.append(0, np.flatnonzero(apart) + 1)[: len(row)]  # of what lies together, there and in the row
        to, stop = slot[first], (source + length)[np.append(first[1:] - 1, len(row) - 1)[: len(first)]]
        moves = zip(to.tolist(), source[first].tolist(), stop.tolist(), strict=True)
        self._moves: list[list[tuple[int, int, int]]] = [[] for _ in range(rows)]
        for of_row, move in zip(row[first].tolist(), moves, strict=True):
            self._moves[of_row].append(move)

    def read(self, start: int, stop: int, data: memoryview) -> bool:
        """Fill `data`, the bytes of the rows ``start..stop``, with what these runs hold.

        False where a document is not there or not what was written: reading it in the other way says what is wrong.
        """
        bounds, base = self._bounds, self._at[start]
        documents = self._documents[bounds[start] : bounds[stop]]
        if not documents:
            return True
        copied = _copies.of(documents, self._at[stop] - base)
        if copied is None:
            return False
        for row in range(start, stop):
            own, low, high = copied[self._at[row] - base :], bounds[row], bounds[row + 1]
            if list(map(isal_zlib.crc32, map(own.__getitem__, self._slices[low:high]))) != self._crc[low:high]:
                return False
            begin = (row - start) * self._row_bytes
            for to, first, last in self._moves[row]:
                data[begin + to : begin + to + last - first] = own[first:last]
        return True


class _Copies(threading.local):
    """A thread's room for what the kernel copies."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Take other room at the next use."""
        self._file: FileIO | None = None
        self._data = memoryview(b"")

    def of(self, pieces: list[memoryview], size: int) -> memoryview | None:
        """The pieces, one after the other; None unless all of their `size` bytes could be copied."""
        if size > len(self._data):
            self._grow(size)
        done, rest = 0, iter(pieces)
        try:
            while some := list(islice(rest, _AT_ONCE)):
                done += os.pwritev(self._file.fileno(), some, done)
        except OSError:
            return None
        return self._data[:size] if done == size else None

    def _grow(self, size: int) -> None:
        self._file = FileIO(os.memfd_create("bst-data"), "r+")
        os.ftruncate(self._file.fileno(), room := 1 << size.bit_length())
        self._data = memoryview(mmap.mmap(self._file.fileno(), room))


_copies = _Copies()
os.register_at_fork(after_in_child=_copies.forget)  # parent and child must not have the kernel copy to one place
