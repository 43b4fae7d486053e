"""Where a run stands, as its directory says."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from bst_dist.faults.lease import BEAT_S, LEASE
from bst_dist.train.rundir import read_outcome

ALIVE_S = 6 * BEAT_S
"""A start that has written its lease within so long is taken to live."""


@dataclass(frozen=True)
class Standing:
    """One word for machines and a line for people."""

    status: str
    """finished, running, stopped, diverged, or broken off."""
    text: str


def standing(run_dir: Path, step: int, steps: int | None) -> Standing:
    """Where a run stands that has taken `step` of `steps` steps (None: its recipe does not say how many)."""
    reached = f"step {step:,}" + ("" if steps is None else f" of {steps:,}")
    outcome = read_outcome(run_dir)
    if outcome is None:  # the start under way has not come to its end, or never will
        if _beats(run_dir):
            return Standing("running", f"running, {reached}")
        return Standing("broken off", f"interrupted after {reached}: killed or failed" if step else "no step yet")
    if outcome.get("finished"):
        return Standing("finished", f"finished, {reached}")
    if diverged := outcome.get("diverged"):
        return Standing("diverged", f"diverged after {reached}: {diverged}")
    return Standing("stopped", f"stopped{' by ' + outcome['stopped'] if 'stopped' in outcome else ''} after {reached}")


def _beats(run_dir: Path) -> bool:
    """Whether a start has said lately that it trains here, in a file that is opened, because a network file system may
    tell an old time otherwise."""
    for path in (run_dir / LEASE).glob("epoch-*.json"):
        try:
            with path.open() as file:
                recent = time.time() - os.fstat(file.fileno()).st_mtime < ALIVE_S
                if recent and '"released": true' not in file.read():
                    return True
        except OSError:
            continue
    return False
