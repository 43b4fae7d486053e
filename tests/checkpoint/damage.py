"""Files as a disk may spoil them."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, place: int | None = None) -> None:
    """Change one bit of the byte at `place`, or of the one in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 4
    path.write_bytes(data)
