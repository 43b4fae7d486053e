"""Download a run that `bst ckpt push` has copied to an object store, with its newest checkpoint.

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
from bst_dist.checkpoint.copies import RunCopy
from bst_dist.checkpoint.directory import CheckpointError, directory, read_manifest, size
from bst_dist.train.rundir import RECIPE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="where the copy is: s3://bucket/run, gs://…, file:///path")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory to write")
    add_step(parser, "the newest")


def run(args: argparse.Namespace) -> dict[str, Any]:
    copy = RunCopy(args.url)
    step = _chosen(copy, args.step)
    _take_files(copy, args.run)
    final = directory(args.run, step)
    if final.exists():
        print(f"{final} already exists")
    else:
        copy.get_checkpoint(args.run, step)
        print(f"checkpoint {step} written to {args.run}, {readable_size(size(read_manifest(final)))}")
    return {"run": str(args.run), "url": copy.url, "step": step}


def _chosen(copy: RunCopy, step: int | None) -> int:
    there = copy.steps()
    if not there or step not in (None, *there):
        said = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{copy.url}: no complete checkpoint{'' if step is None else f' of step {step}'}; "
                              f"there are: {said}")  # fmt: skip
    return there[0] if step is None else step


def _take_files(copy: RunCopy, run_dir: Path) -> None:
    """Download the run's own files into a new directory; raises UserError when another run is there."""
    recipe = run_dir / RECIPE
    if not recipe.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        copy.get_files(run_dir)
    elif recipe.read_bytes() != copy.file(RECIPE):
        raise UserError(f"{run_dir}: holds a run with another recipe than {copy.url}; choose another directory")
