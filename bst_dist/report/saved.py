"""What a command reports, as a file for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bst_dist.version import versions

REPORTS = "reports"
"""Where a run directory keeps what commands have reported of it."""


def write_report(path: Path, command: str, report: dict[str, Any]) -> None:
    """Write a command's report with the versions it ran on; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"command": f"bst {command}", "versions": versions(), **report}, indent=2) + "\n")
    partial.replace(path)
