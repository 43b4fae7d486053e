"""Formats numbers of bytes for people."""

from __future__ import annotations


def readable_size(count: float) -> str:
    """Return a number of bytes with a suitable unit, like 1.7 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def shortage(needed: float, free: float, where: object) -> str:
    """Return a message that `needed` bytes do not fit there, and how many are missing.

    The missing bytes are given too, since the other two numbers may look the same after rounding.
    """
    return (f"it needs {readable_size(needed)}, {where} has {readable_size(free)} free, "
            f"{readable_size(needed - free)} too little")  # fmt: skip
