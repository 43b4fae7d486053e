"""Write the report of a command to a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bst_base.files import write_json
from bst_dist.version import versions

REPORTS = "reports"
"""Folder in a run directory for reports of commands."""


def write_report(path: Path, command: str, report: dict[str, Any]) -> None:
    """Write a command's report, with the versions of code and packages. The file is written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"command": f"bst {command}", "versions": versions(), **report})
