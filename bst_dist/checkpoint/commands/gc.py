"""Remove the checkpoints that a run's settings do not keep, and the leftovers of interrupted writes.

    bst ckpt gc runs/demo                                    # lists what would be removed
    bst ckpt gc runs/demo checkpoint.keep_last=1 --delete

Every file is read first. A damaged checkpoint does not count as kept, and as long as a run has no valid checkpoint to
resume from, nothing is removed. A damaged checkpoint is removed only when its bytes were read and are wrong: one with a
missing file stays, because another host may see it complete. If anything cannot be read, nothing is removed. Files that
a run may be writing right now are left alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bst_base.sizes import readable_size
from bst_dist.checkpoint.commands.common import add_run
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import DAMAGED, DELETED, PARTIAL, WEIGHTS, committed, examine
from bst_dist.checkpoint.retention import (
    CheckpointEntry,
    delete,
    keep_only_weights,
    leftovers,
    readable,
    reasons,
    remove,
    superseded,
)
from bst_dist.config import load_recipe
from bst_dist.train.rundir import RECIPE, read_recipe
from bst_dist.train.schedule import constant_until

RECENT_S = 3600.0
"""Seconds since the last write after which a leftover directory is no longer in use."""


@dataclass(frozen=True)
class Removal:
    """A checkpoint or leftover directory that may be removed."""

    path: Path
    why: str
    bytes: int
    thinned: CheckpointEntry | None = None
    """The checkpoint, if its weights are kept; None: everything is removed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("overrides", nargs="*", metavar="checkpoint.field=value", help="settings to change")
    parser.add_argument("--delete", action="store_true", help="remove them (default: only list them)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    read_recipe(args.run)
    recipe = load_recipe(args.run / RECIPE, args.overrides)
    constant = constant_until(recipe.schedule, recipe.train.steps)
    removals = list(plan(args.run, recipe.checkpoint, constant))
    for removal in removals:
        print(f"{removal.path.name:<28} {readable_size(removal.bytes):>9}  {removal.why}", flush=True)
        if args.delete:
            _remove(removal)
    freed = sum(removal.bytes for removal in removals)
    if not removals:
        print("nothing to remove")
    else:
        print(f"{readable_size(freed)} {'freed' if args.delete else 'would be freed; --delete removes them'}")
    return {"deleted": args.delete, "bytes": freed, "removals": {r.path.name: r.why for r in removals}}


def plan(run_dir: Path, config: CheckpointConfig, constant_until: int | None = None) -> Iterator[Removal]:
    """Yield what may be removed by the rules of `retention.reasons`; raises StorageError when a file cannot be read."""
    found = {path: examine(path) for path in committed(run_dir)}
    valid = [one for one in readable(run_dir) if found.get(one.path) == []]  # not one that was committed just now
    if any(one.full for one in valid):
        kept = reasons(valid, config, constant_until)
        for one in valid:
            if not kept[one.step]:
                yield Removal(one.path, "not kept by the run's settings", _bytes(one.path))
            elif kept[one.step] == ["weights"] and one.full and not one.path.is_symlink():
                yield Removal(one.path, "only its weights are kept", _bytes(one.path, but=WEIGHTS), thinned=one)
        for path, findings in sorted(found.items()):
            if findings and not any(finding.missing for finding in findings):
                yield Removal(path, str(findings[0]), _bytes(path))
        for path in leftovers(run_dir, (DAMAGED,)):
            yield Removal(path, "found damaged when the run was resumed", _bytes(path))
    for path in [*leftovers(run_dir, (PARTIAL, DELETED)), *superseded(run_dir)]:
        if time.time() - max(file.lstat().st_mtime for file in (path, *_files(path))) > RECENT_S:
            yield Removal(path, "left behind by an interrupted write or removal", _bytes(path))


def _remove(removal: Removal) -> None:
    if removal.thinned:
        keep_only_weights(removal.thinned)
        return
    path = removal.path
    remove(path if path.name.endswith((DAMAGED, DELETED, PARTIAL)) else delete(path))


def _bytes(path: Path, but: str | None = None) -> int:
    kept = f"{but}-" if but else None
    return sum(file.stat().st_size for file in _files(path) if not (kept and file.name.startswith(kept)))


def _files(path: Path) -> list[Path]:
    """Return the files that go when `path` is removed: of a link, whose target may be gone too, none."""
    return [] if path.is_symlink() else list(path.iterdir())
