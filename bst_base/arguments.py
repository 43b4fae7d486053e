"""Types of command-line arguments: what is out of range is refused where it is read, with the argument's name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

PICTURES = (".png", ".pdf", ".svg")
"""Endings of the pictures that are drawn."""


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: whole numbers from `least` on."""

    def number(text: str) -> int:
        if (found := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return found

    return number


def seconds(text: str) -> float:
    """For argparse: a time above zero, in seconds."""
    if not (found := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a duration: give seconds above 0")
    return found


def picture(text: str) -> Path:
    """For argparse: a picture to draw, so that another ending is refused before the work that it would show."""
    if (path := Path(text)).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text}: the suffix must be one of {', '.join(PICTURES)}")
    return path
