"""Write the report of a command to a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bst_dist.version import versions

REPORTS = "reports"
"""Folder in a run directory for reports of commands."""


def write_report(path: Path, command: str, report: dict[str, Any]) -> None:
    """Write a command's report, with the versions of code and packages. The file is written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"command": f"bst {command}", "versions": versions(), **report}, indent=2) + "\n")
    partial.replace(path)
