"""Arguments and helpers shared by the `bst ckpt` commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from bst_dist.checkpoint.directory import CheckpointError, committed, read_manifest, require_step
from bst_dist.checkpoint.retention import CheckpointEntry


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the run directory."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")


def add_step(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the option that selects one checkpoint; `default`: described in its help."""
    parser.add_argument("--step", type=int, metavar="N", help=f"the checkpoint after N steps (default: {default})")


def select(run_dir: Path, step: int | None) -> CheckpointEntry:
    """Return the checkpoint of `step`, or the newest for None; raises CheckpointError, listing the existing ones."""
    path = require_step(run_dir, step) if step is not None else next(iter(committed(run_dir)), None)
    if path is None:
        raise CheckpointError(f"{run_dir}: no checkpoint")
    return CheckpointEntry(path, read_manifest(path))
