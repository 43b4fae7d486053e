"""Types of command-line arguments. A value out of range is refused by the parser, with the argument's name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from bst_base.errors import UserError
from bst_base.outputs import require_writable

PICTURES = (".png", ".pdf", ".svg")
"""Supported suffixes of pictures."""


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers of at least `least`."""

    def number(text: str) -> int:
        if (found := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return found

    return number


def seconds(text: str) -> float:
    """Parse a time above zero, in seconds; for argparse."""
    if not (found := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a duration: give seconds above 0")
    return found


def output(text: str) -> Path:
    """Parse the path of a file to write; for argparse. One that cannot be written is refused before the work starts."""
    path = Path(text)
    try:
        require_writable(path)
    except (UserError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def picture(text: str) -> Path:
    """Parse the path of a picture to draw, like `output`. A wrong suffix is refused as well."""
    if Path(text).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text}: the suffix must be one of {', '.join(PICTURES)}")
    return output(text)
