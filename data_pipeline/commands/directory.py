"""The argument CORPUS of commands that read a prepared corpus in a directory."""

from __future__ import annotations

import argparse
from pathlib import Path


def corpus_directory(text: str) -> Path:
    """Return the directory that an argument names. Raises ArgumentTypeError for an address in a store."""
    path = text.removeprefix("file://")
    if "://" in path:
        raise argparse.ArgumentTypeError(
            f"{text.partition('://')[0]}:// is not read here, but by runs, 'bst plan' and 'bst baselines': give a "
            "directory of this machine, into which the corpus was copied"
        )
    return Path(path)
