"""Where the documents of the open shards lie, in columns: the part of their indexes that stays in memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from data_pipeline.format.shards import ShardIndex


class DocumentLayout(NamedTuple):
    """The n documents of one shard, or of several that were opened together.

    A document of one block takes 18 bytes of memory in a tar, and 13 in a packed file.
    """

    offsets: np.ndarray  # (n,) byte offset of the document's first token in its file, a tar or a packed file
    lengths: np.ndarray  # (n,) tokens: uint32, or uint64 if a document has 2^32 or more
    crc_starts: np.ndarray  # (n,) the place in `crc` of the document's first block; if packed, of its shard's
    packed: np.ndarray  # (n,) bool: which lie in packed files, where blocks are counted from the start of the file
    crc: np.ndarray  # (blocks,) uint32
    verified: np.ndarray  # (blocks,) bool: which blocks matched their CRC since the shards were opened

    @classmethod
    def of(cls, index: ShardIndex) -> DocumentLayout:
        """Return the layout of a shard's tar, from its index."""
        return cls._made(index.offsets, index.lengths, index.crc_starts, False, index.crc)

    @classmethod
    def of_packed(cls, index: ShardIndex, crc: np.ndarray) -> DocumentLayout:
        """Return the layout of a shard's packed file, whose blocks have these CRCs."""
        lengths = index.lengths.astype(np.int64)
        begins = (np.cumsum(lengths) - lengths) * index.dtype.itemsize
        return cls._made(begins, lengths, np.zeros_like(lengths), True, crc)

    @classmethod
    def _made(
        cls, offsets: np.ndarray, lengths: np.ndarray, crc_starts: np.ndarray, packed: bool, crc: np.ndarray
    ) -> DocumentLayout:
        columns = map(_narrow, (offsets, lengths, crc_starts))
        return cls(*columns, np.full(len(offsets), packed), crc.astype(np.uint32), np.zeros(len(crc), bool))

    @classmethod
    def join(cls, parts: Sequence[DocumentLayout]) -> DocumentLayout:
        """Return the layouts of several shards as one, in their order."""
        if len(parts) == 1:
            return parts[0]
        blocks = [len(part.crc) for part in parts]
        before = np.cumsum([0, *blocks[:-1]])
        starts = [part.crc_starts + int(first) for part, first in zip(parts, before, strict=True)]
        offsets, lengths, _, packed, crc, verified = map(np.concatenate, zip(*parts, strict=True))
        return cls(offsets, lengths, _narrow(np.concatenate(starts)), packed, crc, np.zeros_like(verified))

    def part(self, start: int, stop: int) -> DocumentLayout:
        """Return the documents ``start..stop``, over the same memory. Blocks keep their places."""
        own = ("offsets", "lengths", "crc_starts", "packed")
        return self._replace(**{name: getattr(self, name)[start:stop] for name in own})


def _narrow(values: np.ndarray) -> np.ndarray:
    """Return the values as uint32 if they fit, else as uint64."""
    return values.astype(np.uint32 if values.max(initial=0) < 1 << 32 else np.uint64)


class Found(NamedTuple):
    """The places of m of the documents that were asked for, in shards that were opened together."""

    which: np.ndarray  # (m,) their indices among the documents that were asked for
    shards: np.ndarray  # (m,) the shard of each
    places: np.ndarray  # (m,) the place of each in the layout
    firsts: np.ndarray  # (m,) the place in the layout of the first document of its shard
    layout: DocumentLayout


class OpenShards:
    """The layouts of the open shards of a split, grouped by the shards that were opened together.

    Several threads may call it. A shard that is opened again, together with others, belongs to the new group.

    Args:
        shards: number of shards of the split.
        first_documents: (shards + 1,) the number of each shard's first document, then the number of all documents.
    """

    def __init__(self, shards: int, first_documents: np.ndarray) -> None:
        self._firsts = first_documents
        self._number = np.full(shards, -1, np.int32)  # the number of each shard's group; -1 for a closed shard
        self._begins = np.zeros(shards, np.int64)  # the place of each shard's first document in its layout
        self._layouts: dict[int, DocumentLayout] = {}
        self._users: dict[int, int] = {}  # how many shards of each group are still open
        self._numbers = count()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int((self._number >= 0).sum())

    def together(self, shards: np.ndarray) -> DocumentLayout | None:
        """Return the layout of shards that form one whole group; None if they do not."""
        with self._lock:
            numbers = np.unique(self._number[shards]).tolist()
            same = len(numbers) == 1 and self._users.get(numbers[0]) == len(shards)
            return self._layouts[numbers[0]] if same else None

    def add(self, shards: np.ndarray, layout: DocumentLayout) -> DocumentLayout:
        """Add shards as one group; return their layout."""
        documents = self._firsts[shards + 1] - self._firsts[shards]
        with self._lock:
            self._forget(shards)
            number = next(self._numbers)
            self._layouts[number] = layout
            self._users[number] = len(shards)
            self._begins[shards] = np.cumsum(documents) - documents
            self._number[shards] = number
        return layout

    def release(self, shards: np.ndarray) -> None:
        """Close those of the shards that are open."""
        with self._lock:
            self._forget(shards)

    def part(self, shard: int) -> DocumentLayout | None:
        """Return the layout of one shard; None if it is closed."""
        with self._lock:
            if self._number[shard] < 0:
                return None
            begin = int(self._begins[shard])
            stop = begin + int(self._firsts[shard + 1] - self._firsts[shard])
            return self._layouts[int(self._number[shard])].part(begin, stop)

    def find(self, documents: np.ndarray, shards: np.ndarray) -> list[Found] | np.ndarray:
        """Locate documents (m,) in their shards (m,).

        If some of these shards are closed, return the closed shards instead.
        """
        with self._lock:
            number = self._number[shards]
            layouts = dict(self._layouts)
            firsts = self._begins[shards]
        if (closed := number < 0).any():
            return np.unique(shards[closed])
        places = documents - self._firsts[shards] + firsts
        if len(together := np.unique(number).tolist()) == 1:
            return [Found(np.arange(len(documents)), shards, places, firsts, layouts[together[0]])]
        own = [(each, np.flatnonzero(number == each)) for each in together]
        return [Found(which, shards[which], places[which], firsts[which], layouts[each]) for each, which in own]

    def _forget(self, shards: np.ndarray) -> None:
        numbers, counts = np.unique(self._number[shards], return_counts=True)
        self._number[shards] = -1
        for number, closed in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number >= 0:
                self._users[number] -= closed
                if not self._users[number]:
                    del self._users[number], self._layouts[number]
