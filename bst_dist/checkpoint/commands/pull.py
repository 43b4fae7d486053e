"""Download a run that `bst ckpt push` has copied to an object store, with its newest full checkpoint.

    bst ckpt pull s3://bucket/demo runs/demo
    bst ckpt pull s3://bucket/demo runs/demo --step 240
    bst train runs/demo --resume

Every file is compared with its digest before the checkpoint gets its name. An existing run directory must be of the
same run; it keeps its own files and gets the checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_base.sizes import readable_size
from bst_dist.checkpoint.commands.common import add_step
from bst_dist.checkpoint.commands.copied_run import other_run
from bst_dist.checkpoint.directory import CheckpointError, find, is_full, read_manifest, size
from bst_dist.checkpoint.object_copy import RunCopy, contains
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
    full = next((one for one in there if is_full(copy.manifest(one))), there[0])
    if full != there[0]:
        print(f"checkpoint {there[0]} is newer, but has only weights: no run can resume from it (--step {there[0]})")
    return full


def _take_files(copy: RunCopy, run_dir: Path) -> None:
    """Download the run's own files into a new directory; raises UserError when another run is there."""
    if not (run_dir / RECIPE).exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        copy.get_files(run_dir, last=RECIPE)  # the next pull repeats an interrupted one unless there is a recipe
    elif difference := other_run(copy, run_dir):
        raise UserError(f"{run_dir}: holds another run than {copy.url} ({difference}): choose another directory")
