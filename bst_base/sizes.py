"""Formats numbers of bytes, counts of things, and lists of numbers, for people."""

from __future__ import annotations

from collections.abc import Sequence


def readable_size(count: float) -> str:
    """Return a number of bytes with a suitable unit, like 1.7 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(count: int, thing: str, things: str | None = None) -> str:
    """Return a count with its noun, like ``1 rank`` or ``3 ranks``. `things`: the plural, unless it only adds an s."""
    return f"{count} {thing if count == 1 else things or f'{thing}s'}"


def shortage(needed: float, free: float, where: object) -> str:
    """Return a message that `needed` bytes do not fit there, and how many are missing.

    The missing bytes are given too, since the other two numbers may look the same after rounding.
    """
    return (
        f"it needs {readable_size(needed)}, {where} has {readable_size(free)} free, "
        f"{readable_size(needed - free)} too little"
    )


def spans(numbers: Sequence[int]) -> str:
    """Format ascending numbers as ``1 to 3, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in parts)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Format ascending numbers of ranks as ``rank 7`` or ``ranks 1 to 3, 7``."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)}"
