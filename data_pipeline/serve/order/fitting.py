"""Best fit: reorders documents so that sequences cut few of the documents that they could hold whole.

Documents are taken in the order of the permutation, as long as the rest of the sequence after the next document can be
filled exactly by none, one or two of the waiting documents. Otherwise the choice is, in this order: a waiting document
that fills the sequence exactly; two that do; the next document, if it fits; the largest one that fits. Only if none
fits is the next document cut. With thousands of documents to choose from that is rare. So no padding is added, a pass
keeps its number of sequences, and the stream is still that of all documents, one after the other. (Best-fit packing by
Ding et al., arXiv 2404.10830, pads the rest that it cannot fill.)
"""

from __future__ import annotations

from collections import deque

import numpy as np


def best_fit(sizes: np.ndarray, length: int, room: int) -> np.ndarray:
    """Return (n,) int64: the order in which to take documents of the given `sizes`, (n,).

    Sequences are `length` long, and the first has `room` left. A document longer than that is cut in any case, so it is
    taken when its turn comes. The result depends only on `sizes`, which are in the order of the permutation, `length`
    and `room`. The time is linear in n, with a few operations on `length` bits for each document.
    """
    order = np.empty(len(sizes), np.int64)
    taken = bytearray(len(sizes))
    waiting = _Waiting(length)
    values = sizes.tolist()
    for place, size in enumerate(values):
        if size <= length:
            waiting.add(size, place)
    done = 0
    for turn, size in enumerate(values):
        while not taken[turn]:
            chosen = size if size > length else waiting.choose(size, room)
            place = turn if chosen > length else waiting.take(chosen)
            order[done], taken[place] = place, True
            done += 1
            room = length - (chosen - room) % length
    return order


class _Waiting:
    """The documents that are not taken yet, by size. Among equal sizes the first document comes first."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._places = [deque[int]() for _ in range(length + 1)]
        self._present = 0  # bit s: a document of size s is waiting
        self._mirrored = 0  # bit length - s: a document of size s is waiting

    def add(self, size: int, place: int) -> None:
        self._places[size].append(place)
        if len(self._places[size]) == 1:
            self._flip(size)

    def take(self, size: int) -> int:
        place = self._places[size].popleft()
        if not self._places[size]:
            self._flip(size)
        return place

    def choose(self, size: int, room: int) -> int:
        """Return the size of the document to take. The next document in order has `size`, and `room` is left."""
        if size <= room and self._fills(room - size, without=size):
            return size
        if self._present >> room & 1:
            return room
        if pairs := self._pairs(room):
            return pairs.bit_length() - 1
        if size <= room:
            return size
        fitting = self._present & ((2 << room) - 1)
        return fitting.bit_length() - 1 if fitting else size

    def _fills(self, room: int, without: int) -> bool:
        """Whether none, one or two waiting documents fill `room` exactly, without one document of size `without`."""
        alone = len(self._places[without]) == 1
        if alone:
            self._flip(without)
        found = not room or bool(self._present >> room & 1) or bool(self._pairs(room, without))
        if alone:
            self._flip(without)
        return found

    def _pairs(self, room: int, without: int | None = None) -> int:
        """Return the sizes s for which a document of size s and another of size ``room - s`` are waiting, as bits."""
        pairs = self._present & (self._mirrored >> (self._length - room)) & ((2 << room) - 1)
        half = room // 2
        if room % 2 == 0 and len(self._places[half]) - (half == without) < 2:
            pairs &= ~(1 << half)
        return pairs

    def _flip(self, size: int) -> None:
        self._present ^= 1 << size
        self._mirrored ^= 1 << (self._length - size)


def cut(sizes: np.ndarray, length: int, room: int) -> np.ndarray:
    """Return (n,) bool: which of the documents that fit into a sequence are cut in two, if taken in this order."""
    ends = np.cumsum(sizes, dtype=np.int64) + length - room
    return (sizes <= length) & ((ends - sizes) // length != (ends - 1) // length) & (sizes > 0)
