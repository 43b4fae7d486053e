"""A hash table of numbers for lookups of many keys at a time: open addressing in numpy arrays."""

from __future__ import annotations

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 divided by the golden ratio
_EMPTY = np.uint64(0)


class Table:
    """Maps keys (uint64, not 0) to values (int32, not negative).

    Args:
        room: the expected number of keys. The table grows when there are more.
    """

    def __init__(self, room: int) -> None:
        self._count = 0
        self._make(room)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return (n,) int32: the value of each key; -1 if it is not in the table."""
        slots = self._slots(keys)
        there = self._keys.take(slots)
        other = there != keys
        found = self._values.take(slots)  # -1 where the slot is empty
        more = (other & (found >= 0)).nonzero()[0]
        slots, keys = slots[more], keys[more]
        while len(more):
            slots = slots + 1 & self._last
            there, found[more] = self._keys.take(slots), self._values.take(slots)
            on = ((there != keys) & (there != _EMPTY)).nonzero()[0]
            more, slots, keys = more[on], slots[on], keys[on]
        return found

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add keys, (n,). They must be distinct, and not yet in the table."""
        self._count += len(keys)
        if self._count > self._room:
            there = np.flatnonzero(self._keys)
            keys, values = np.append(self._keys[there], keys), np.append(self._values[there], values)
            self._make(2 * self._count)
        slots = self._slots(keys)
        while len(keys):
            free = np.flatnonzero(self._keys[slots] == _EMPTY)
            self._keys[slots[free]] = keys[free]  # if several keys share a slot, the last one stays
            own = free[self._keys[slots[free]] == keys[free]]
            self._values[slots[own]] = values[own]
            left = np.ones(len(keys), bool)
            left[own] = False
            keys, values, slots = keys[left], values[left], slots[left] + 1 & self._last

    def _make(self, room: int) -> None:
        bits = room.bit_length() + 1  # so at least half of the slots are free
        self._room = room
        self._keys = np.zeros(1 << bits, np.uint64)
        self._values = np.full(1 << bits, -1, np.int32)
        self._shift, self._last = np.uint64(64 - bits), (1 << bits) - 1

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return (keys * _MULTIPLIER >> self._shift).view(np.int64)
