"""Text in R's lazy-load databases, the format in which an R package stores data."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from bst_base.errors import UserError


def r_character_vectors(path: Path) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database.

    Its chunks are [length, big-endian u32][zlib data]. Each holds one value in R's XDR serialisation, version 2 or 3
    ("R Internals", Serialization Formats). Raises UserError for a value of another type.
    """
    data = path.read_bytes()
    position = 0
    while position < len(data):
        unpacker = zlib.decompressobj()
        value = unpacker.decompress(data[position + 4 :])
        position = len(data) - len(unpacker.unused_data)
        lines = _character_vector(value)
        if lines is None:
            raise UserError(f"{path}: not an R database of character vectors (byte {position})")
        yield lines


def _character_vector(value: bytes) -> list[str] | None:
    if value[:2] != b"X\n":
        return None
    position = 14
    if struct.unpack_from(">i", value, 2)[0] >= 3:  # the native encoding's name follows
        position += 4 + struct.unpack_from(">i", value, position)[0]
    flags, count = struct.unpack_from(">ii", value, position)
    if flags & 0xFF != 16:  # STRSXP
        return None
    position += 8
    lines = []
    for _ in range(count):
        size = struct.unpack_from(">i", value, position + 4)[0]
        position += 8
        lines.append(value[position : position + max(size, 0)].decode())  # -1: a missing string
        position += max(size, 0)
    return lines
