"""Which byte of a damaged block changed, from its CRC alone."""

from __future__ import annotations

import zlib

# What one changed byte does to a CRC-32: the CRC is linear, so all but the exclusive or of old and new byte cancels.
_TABLE = [zlib.crc32(bytes([value])) ^ zlib.crc32(b"\0") for value in range(256)]
_CHANGE = {syndrome: value for value, syndrome in enumerate(_TABLE) if value}
_BY_TOP = {syndrome >> 24: value for value, syndrome in enumerate(_TABLE)}


def locate_changed_byte(data: bytes | memoryview, expected: int) -> tuple[int, int] | None:
    """(place, byte that was written) when one changed byte explains why the CRC-32 of `data` is not `expected`.

    The difference of the two CRCs is that of the changed byte, carried through the zero bytes after it; undoing them
    one at a time finds the place. None when no single byte explains it; other damage to 16 kB is mistaken for a single
    changed byte with a probability of 0.1 %.
    """
    difference = zlib.crc32(data) ^ expected
    for place in range(len(data) - 1, -1, -1):
        if difference in _CHANGE:
            return place, data[place] ^ _CHANGE[difference]
        value = _BY_TOP[difference >> 24]
        difference = ((difference ^ _TABLE[value]) << 8 | value) & 0xFFFFFFFF
    return None
