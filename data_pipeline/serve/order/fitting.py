"""Best fit: an order of documents in which sequences cut few of those that they could hold whole.

Documents are taken in the order of the permutation, as long as what is left of the sequence then can be filled to its
end by one or two of those that wait. Where it cannot, one is taken before the next in turn that fills the sequence, or
two that do, or the largest that fits; only where none fits is the next one cut. With thousands of documents to choose
from that is rare. So nothing is padded for it, a pass has the same number of sequences, and the stream is still that of
all documents, one after the other. (Best-fit packing by Ding et al., arXiv 2404.10830, pads what it cannot fill.)
"""

from __future__ import annotations

from collections import deque

import numpy as np


def best_fit(sizes: np.ndarray, length: int, room: int) -> np.ndarray:
    """(n,) int64: in which order to take documents that take up `sizes`, (n,).

    Sequences are `length` long, and the first has `room` left. A longer document is cut in any case, so it is taken
    when its turn comes. What is taken depends on `sizes`, which are in the order of the permutation, and on nothing
    else. Linear in n, with a few operations on `length` bits for each document.
    """
    order, taken, waiting = np.empty(len(sizes), np.int64), bytearray(len(sizes)), _Waiting(length)
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
    """The documents that are not taken yet, by their size; of equal ones the first comes first."""

    def __init__(self, length: int) -> None:
        self._length, self._places = length, [deque[int]() for _ in range(length + 1)]
        self._present = 0  # bit s: a document of size s is waiting
        self._mirrored = 0  # bit length - s: the same

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
        """The size of the document to take where the one whose turn it is has `size`, and `room` is left."""
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
        """Whether none, one or two of those that wait fill this exactly, but for one of size `without`."""
        alone = len(self._places[without]) == 1
        if alone:
            self._flip(without)
        found = not room or bool(self._present >> room & 1) or bool(self._pairs(room, without))
        if alone:
            self._flip(without)
        return found

    def _pairs(self, room: int, without: int | None = None) -> int:
        """Bit s: a document of size s and another of size ``room - s`` are waiting, which are not the same."""
        pairs = self._present & (self._mirrored >> (self._length - room)) & ((2 << room) - 1)
        half = room // 2
        if room % 2 == 0 and len(self._places[half]) - (half == without) < 2:
            pairs &= ~(1 << half)
        return pairs

    def _flip(self, size: int) -> None:
        self._present ^= 1 << size
        self._mirrored ^= 1 << (self._length - size)


def cut(sizes: np.ndarray, length: int, room: int) -> np.ndarray:
    """(n,) bool: which of the documents that a sequence could hold lie in two, when they are taken in this order."""
    ends = np.cumsum(sizes, dtype=np.int64) + length - room
    return (sizes <= length) & ((ends - sizes) // length != (ends - 1) // length) & (sizes > 0)
