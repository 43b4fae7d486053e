"""Where documents lie in their shards, in columns: what is kept of the indexes of shards that are open."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from data_pipeline.format.shards import ShardIndex


class Layout(NamedTuple):
    """The n documents of one shard, or of some that were opened together; 18 bytes a document of one block in a tar, 13
    in a packed file."""

    offsets: np.ndarray  # (n,) byte of its file, a tar or a packed one, where the document's first token lies
    lengths: np.ndarray  # (n,) its tokens: uint32, or uint64 where a document has 2^32 or more
    crc_starts: np.ndarray  # (n,) the place in `crc` of its first block; where it is packed, of its shard's first
    packed: np.ndarray  # (n,) bool: which lie in packed files, where blocks are counted from the beginning of the file
    crc: np.ndarray  # (blocks,) uint32
    verified: np.ndarray  # (blocks,) bool: found whole since the shards were opened

    @classmethod
    def of(cls, index: ShardIndex) -> Layout:
        """What the index of a shard says."""
        return cls._made(index.offsets, index.lengths, index.crc_starts, False, index.crc)

    @classmethod
    def of_packed(cls, index: ShardIndex, crc: np.ndarray) -> Layout:
        """Where the documents lie in a shard's packed file, whose blocks have these CRCs."""
        lengths = index.lengths.astype(np.int64)
        begins = (np.cumsum(lengths) - lengths) * index.dtype.itemsize
        return cls._made(begins, lengths, np.zeros_like(lengths), True, crc)

    @classmethod
    def _made(
        cls, offsets: np.ndarray, lengths: np.ndarray, crc_starts: np.ndarray, packed: bool, crc: np.ndarray
    ) -> Layout:
        columns = map(_narrow, (offsets, lengths, crc_starts))
        return cls(*columns, np.full(len(offsets), packed), crc.astype(np.uint32), np.zeros(len(crc), bool))

    @classmethod
    def join(cls, parts: Sequence[Layout]) -> Layout:
        """Those of several shards as one, in their order."""
        if len(parts) == 1:
            return parts[0]
        blocks = [len(part.crc) for part in parts]
        before = np.cumsum([0, *blocks[:-1]])
        starts = [part.crc_starts + int(first) for part, first in zip(parts, before, strict=True)]
        offsets, lengths, _, packed, crc, verified = map(np.concatenate, zip(*parts, strict=True))
        return cls(offsets, lengths, _narrow(np.concatenate(starts)), packed, crc, np.zeros_like(verified))

    def part(self, start: int, stop: int) -> Layout:
        """The documents ``start..stop``, over the same memory; blocks keep their places."""
        own = ("offsets", "lengths", "crc_starts", "packed")
        return self._replace(**{name: getattr(self, name)[start:stop] for name in own})


def _narrow(values: np.ndarray) -> np.ndarray:
    """In 32 bits where that holds them."""
    return values.astype(np.uint32 if values.max(initial=0) < 1 << 32 else np.uint64)


class Found(NamedTuple):
    """Where some of the documents lie that were looked for: m of them, of shards that were opened together."""

    which: np.ndarray  # (m,) of those that were looked for
    shards: np.ndarray  # (m,)
    places: np.ndarray  # (m,) in the layout
    firsts: np.ndarray  # (m,) likewise, of the first document of the shard
    layout: Layout


class OpenShards:
    """The layouts of the shards of a split that are open, by the shards that were opened together.

    Calls may be made from several threads. A shard that is opened again, with others, counts to the last ones.

    Args:
        shards: of the split.
        first_documents: (shards + 1,) the number of each shard's first document, and of all.
    """

    def __init__(self, shards: int, first_documents: np.ndarray) -> None:
        self._firsts = first_documents
        self._number = np.full(shards, -1, np.int32)  # of what each shard was opened with; -1 where it is not open
        self._begins = np.zeros(shards, np.int64)  # the place of each shard's first document in its layout
        self._layouts: dict[int, Layout] = {}
        self._users: dict[int, int] = {}  # how many shards are left of those that were opened together
        self._numbers = count()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int((self._number >= 0).sum())

    def together(self, shards: np.ndarray) -> Layout | None:
        """The layout of shards that were opened together and alone; None where they were not."""
        with self._lock:
            numbers = np.unique(self._number[shards]).tolist()
            same = len(numbers) == 1 and self._users.get(numbers[0]) == len(shards)
            return self._layouts[numbers[0]] if same else None

    def add(self, shards: np.ndarray, layout: Layout) -> Layout:
        """Open shards; returns their layout."""
        documents = self._firsts[shards + 1] - self._firsts[shards]
        with self._lock:
            self._forget(shards)
            number = next(self._numbers)
            self._layouts[number], self._users[number] = layout, len(shards)
            self._begins[shards] = np.cumsum(documents) - documents
            self._number[shards] = number
        return layout

    def release(self, shards: np.ndarray) -> None:
        """Close shards, as far as they are open."""
        with self._lock:
            self._forget(shards)

    def part(self, shard: int) -> Layout | None:
        """The layout of one shard; None where it is not open."""
        with self._lock:
            if self._number[shard] < 0:
                return None
            begin = int(self._begins[shard])
            stop = begin + int(self._firsts[shard + 1] - self._firsts[shard])
            return self._layouts[int(self._number[shard])].part(begin, stop)

    def find(self, documents: np.ndarray, shards: np.ndarray) -> list[Found] | np.ndarray:
        """Where documents (m,) of the shards (m,) lie; or those of the shards that have to be opened for it."""
        with self._lock:
            number, layouts = self._number[shards], dict(self._layouts)
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
