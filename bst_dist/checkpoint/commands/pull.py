"""Download a run that `bst ckpt push` has copied to an object store, with its newest full checkpoint.

    bst ckpt pull s3://bucket/demo runs/demo
    bst ckpt pull s3://bucket/demo runs/demo --step 240
    bst train runs/demo --resume

Every file is compared with its digest before the checkpoint gets its name. An existing run directory must be of the
same run; it keeps its own files and gets the checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_base.sizes import readable_size
from bst_dist.checkpoint.commands.common import add_step
from bst_dist.checkpoint.commands.copied_run import other_run
from bst_dist.checkpoint.directory import CheckpointError, find, is_full, read_manifest, size
from bst_dist.checkpoint.object_copy import DamagedCopyError, RunCopy, contains
from bst_dist.train.rundir import RECIPE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="where the copy is: s3://bucket/run, gs://…, file:///path")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory to write")
    add_step(parser, "the newest that a run can resume from")


def run(args: argparse.Namespace) -> dict[str, Any]:
    copy = RunCopy(args.url)
    step = _chosen(copy, args.step)
    _take_files(copy, args.run)
    final = find(args.run, step)
    if final is not None:
        own, there = read_manifest(final), copy.manifest(step)
        if not (contains(own, there) and contains(there, own)):
            raise CheckpointError(
                f"{final}: is not the checkpoint that {copy.url} has of this step; choose another directory"
            )
        print(f"{final} already exists")
    else:
        final = copy.get_checkpoint(args.run, step)
        print(f"checkpoint {step} written to {args.run}, {readable_size(size(read_manifest(final)))}")
    return {"run": str(args.run), "url": copy.url, "step": step}


def _chosen(copy: RunCopy, step: int | None) -> int:
    there = copy.steps()
    if not there or step not in (None, *there):
        said = ", ".join(map(str, there)) or "none"
        raise CheckpointError(
            f"{copy.url}: no complete checkpoint{'' if step is None else f' of step {step}'}; there are: {said}"
        )
    if step is not None:
        return step
    return _newest(copy, there)


def _newest(copy: RunCopy, there: Sequence[int]) -> int:
    """Return the newest step of `there` that a run can resume from, or else the newest with whole weights.

    Damaged manifests are named, and their steps left out; raises DamagedCopyError when all are damaged.
    """
    only_weights: list[int] = []
    damaged: list[DamagedCopyError] = []
    chosen = None
    for step in there:
        try:
            if is_full(copy.manifest(step)):
                chosen = step
                break
            only_weights.append(step)
        except DamagedCopyError as error:
            damaged.append(error)
    if chosen is None and not only_weights:
        raise damaged[0]
    for error in damaged:
        print(f"{error}; the newest whole checkpoint is taken")
    if chosen is None:
        return only_weights[0]
    for step in only_weights[:1]:
        print(f"checkpoint {step} is newer, but has only weights: no run can resume from it (--step {step})")
    return chosen


def _take_files(copy: RunCopy, run_dir: Path) -> None:
    """Download the run's own files into a new directory; raises UserError when another run is there."""
    if not (run_dir / RECIPE).exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        copy.get_files(run_dir, last=RECIPE)  # the next pull repeats an interrupted one unless there is a recipe
    elif difference := other_run(copy, run_dir):
        raise UserError(f"{run_dir}: holds another run than {copy.url} ({difference}): choose another directory")
