"""Compares a run with its copy in an object store: is it the same run, and what of the copy has the run abandoned?

A run directory can go back to an earlier step: when the guard rolls the run back, or when a start resumes from an
earlier checkpoint because later ones were damaged or taken away. The run then takes the later steps again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bst_base.json_lines import read_lines
from bst_dist.checkpoint.object_copy import RunCopy, contains
from bst_dist.checkpoint.retention import readable
from bst_dist.faults import ledger
from bst_dist.train.rundir import ENVIRONMENT, OUTCOME, RECIPE, read_starts


def other_run(copy: RunCopy, run_dir: Path) -> str | None:
    """Return how the copied run differs from the one in `run_dir`; None when they are the same or nothing is copied.

    A run is known by its first start, since settings in its recipe may change from start to start. A run without
    starts, such as an imported one, is known by its recipe.
    """
    there, here = _copied_starts(copy.file(ENVIRONMENT)), read_starts(run_dir)
    if there and here:
        return None if there[0] == here[0] else f"first started {_when(there[0])}, and this one {_when(here[0])}"
    recipe = copy.file(RECIPE)
    return None if recipe in (None, _content(run_dir / RECIPE)) else "it has another recipe"


def ended(copy: RunCopy, run_dir: Path) -> bool:
    """Whether the last start has ended, and the copy does not have its outcome."""
    outcome = _content(run_dir / OUTCOME)
    return outcome is not None and outcome != copy.file(OUTCOME)


def abandoned(run_dir: Path, there: Mapping[int, dict[str, Any]]) -> list[int]:
    """Return the steps of copied checkpoints whose steps the run has taken again, or will take again.

    `there`: the manifests in the store, by step. A checkpoint that is only missing in the run directory is not
    abandoned: the copy may be all that is left of it.
    """
    own = {one.step: one.manifest for one in readable(run_dir)}
    entries = [ledger.Entry(**line) for line in read_lines(run_dir / ledger.FILE)]
    starts = read_starts(run_dir)

    def left(step: int, manifest: dict[str, Any]) -> bool:
        rolled_back = any(
            entry.back_to is not None and entry.back_to < step and manifest["skipped"] <= entry.skipped
            for entry in entries
        )
        return rolled_back or any(
            start.get("from_step", step) < step and manifest["time"] < start["time"] for start in starts
        )

    return [
        step
        for step, manifest in there.items()
        if not (step in own and contains(manifest, own[step])) and left(step, manifest)
    ]


def _copied_starts(environment: bytes | None) -> list[dict[str, Any]]:
    """Like `read_starts`, for the file in the store; none also when a write to the store was cut off."""
    try:
        return json.loads(environment or "")["starts"]
    except ValueError:
        return []


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _when(start: dict[str, Any]) -> str:
    return f"at {start['time']} on {', '.join(start['hosts'])}"
