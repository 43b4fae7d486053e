"""Numbers of bytes as people read them."""

from __future__ import annotations


def readable_size(count: float) -> str:
    """Bytes with the unit in which they are easiest to read: 1.7 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def shortage(needed: float, free: float, where: object) -> str:
    """Why `needed` bytes cannot be written there, and how much is missing (both may round to the same number)."""
    return (f"it needs {readable_size(needed)}, {where} has {readable_size(free)} free, "
            f"{readable_size(needed - free)} too little")  # fmt: skip
