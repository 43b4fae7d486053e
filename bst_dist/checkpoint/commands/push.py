"""Copy a run and its newest checkpoint to an object store.

    bst ckpt push runs/demo s3://bucket/demo
    bst ckpt push runs/demo s3://bucket/demo --watch --keep 3     # each new one, until the run has finished

`bst ckpt pull` downloads the copy. A push can run during training, on any host that sees the run directory; training
never waits for it. A checkpoint's manifest is sent last, so an interrupted push leaves no checkpoint there; the next
push sends it again. Damaged files are not sent. Credentials come from where the store's client looks for them (for S3:
AWS_…).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bst_base.errors import StorageError, UserError
from bst_base.sizes import readable_size
from bst_dist.checkpoint.commands.common import add_run, add_step, select
from bst_dist.checkpoint.copies import RunCopy
from bst_dist.checkpoint.directory import committed, is_full, step_of
from bst_dist.checkpoint.retention import CheckpointEntry
from bst_dist.train.rundir import read_outcome, read_recipe

POLL_S = 20.0
"""Seconds between two checks of --watch for a new checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("url", metavar="URL", help="where to: s3://bucket/run, gs://…, file:///path")
    add_step(parser, "the newest")
    parser.add_argument(
        "--keep", type=int, default=2, metavar="N",
        help="how many of the newest to keep there, besides those pinned in RUN (default: 2)",
    )  # fmt: skip
    parser.add_argument("--watch", action="store_true", help="send each new checkpoint until the run has finished")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.watch and args.step is not None:
        raise UserError("--watch sends each new checkpoint: leave out --step")
    if args.keep < 1:
        raise UserError(f"--keep {args.keep}: at least 1")
    read_recipe(args.run)
    copy, sent = RunCopy(args.url), 0
    while True:
        over = (read_outcome(args.run) or {}).get("finished", False)
        if not args.watch or committed(args.run):
            sent += _push(args.run, copy, args.step)
            _forget(args.run, copy, args.keep)
        if over or not args.watch:
            return {"run": str(args.run), "url": copy.url, "bytes": sent, "steps": copy.steps()}
        time.sleep(POLL_S)


def _push(run_dir: Path, copy: RunCopy, step: int | None) -> int:
    """Send a checkpoint and the run's files; return the number of bytes sent of the checkpoint."""
    while True:
        one = select(run_dir, step)
        try:
            sent = copy.put_checkpoint(one.path)
        except StorageError:
            if step is None and not one.path.is_dir() and committed(run_dir):
                print(f"checkpoint {one.step} was removed by the run while it was sent; taking the newest", flush=True)
                continue
            raise
        if sent:
            copy.put_files(run_dir)
            print(f"checkpoint {one.step} sent to {copy.url}, {readable_size(sent)}", flush=True)
        return sent


def _forget(run_dir: Path, copy: RunCopy, keep: int) -> None:
    """Remove from the store the checkpoints that are neither among the newest `keep` nor pinned in the run."""
    pinned = {step_of(path) for path in committed(run_dir) if CheckpointEntry(path, {}).pinned}
    full = [step for step in copy.steps() if step not in pinned and is_full(copy.manifest(step))]
    for step in full[keep:]:
        copy.remove(step)
        print(f"checkpoint {step} removed from {copy.url} (--keep {keep})", flush=True)
