"""Damage files as a faulty disk may do."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, place: int | None = None) -> None:
    """Flip one bit of the byte at `place`, by default of the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 4
    path.write_bytes(data)
