"""Arguments and helpers shared by the `bst ckpt` commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from bst_dist.checkpoint.directory import CheckpointError, committed, find, read_manifest, step_of
from bst_dist.checkpoint.retention import CheckpointEntry


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the run directory."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")


def add_step(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option that selects one checkpoint; `default`: described in its help."""
    parser.add_argument("--step", type=int, metavar="N", help=f"the checkpoint after N steps (default: {default})")


def select(run_dir: Path, step: int | None) -> CheckpointEntry:
    """Return the checkpoint of `step`, or the newest for None; raises CheckpointError, listing the existing ones."""
    there = committed(run_dir)
    path = find(run_dir, step) if step is not None else next(iter(there), None)
    if path is None:
        steps = ", ".join(str(step_of(found)) for found in there) or "none"
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}; there are: {steps}"
        raise CheckpointError(f"{run_dir}: {wanted}")
    return CheckpointEntry(path, read_manifest(path))
