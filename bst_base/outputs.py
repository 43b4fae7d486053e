"""The files that a command writes: checked before its work begins, and the numbers written before anything else."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from bst_base.errors import UserError


def require_writable(path: Path) -> None:
    """Raise UserError if a file cannot be written at `path`. Missing directories are no error: they are created.

    This costs no time before hours of work. A disk that fills up meanwhile is found only when the file is written.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} exists and is not a regular file: give the name of a file to write")
    folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not folder.is_dir():
        raise UserError(f"{path} cannot be written: {folder} is not a directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission to write in {folder}")


def write_afterwards(args: argparse.Namespace, write: Callable[[], object]) -> None:
    """Have the program call `write` after it has written the command's report.

    For figures and other files that are made from the numbers: no number is lost because such a file cannot be made.
    """
    args.__dict__.setdefault("afterwards", []).append(write)


def left_for_afterwards(args: argparse.Namespace) -> list[Callable[[], object]]:
    """Return what was given to `write_afterwards`, in this order."""
    return getattr(args, "afterwards", [])
