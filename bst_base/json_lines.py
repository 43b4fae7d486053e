"""JSON Lines files: one JSON object per line. Lines that a run removes from such a file are kept in a second one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bst_base.clock import utc_now


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON Lines file. An incomplete last line, after a kill, is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def dropped_file(path: Path) -> Path:
    """Return the file that receives lines dropped from `path`, a JSON Lines file."""
    return path.with_suffix(f".dropped{path.suffix}")


def keep_dropped(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Append `lines`, which are about to be removed from the JSON Lines file `path`, to its file of dropped lines."""
    if not lines:
        return
    when = utc_now()
    with dropped_file(path).open("ab") as file:
        file.writelines(json.dumps({**line, "dropped": when}).encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
