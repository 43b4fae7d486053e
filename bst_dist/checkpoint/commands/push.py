"""Copy a run and its newest full checkpoint to an object store, and a newer one of only the weights if there is one.

    bst ckpt push runs/demo s3://bucket/demo
    bst ckpt push runs/demo s3://bucket/demo --watch --keep 3     # each new one, until the run has ended

`bst ckpt pull` downloads the copy. A push can run during training, on any host that sees the run directory; training
never waits for it. A checkpoint's manifest is sent last, so an interrupted push leaves no checkpoint there; the next
push sends it again. Damaged files are not sent. When the run has gone back to an earlier step, the copy follows: a
checkpoint taken again replaces that of the same step, and later ones are removed. Another run is refused. With --watch,
an error of the store or of the run's file system is printed, and the push tried again. Credentials come from where the
store's client looks for them (for S3: AWS_…).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bst_base.errors import StorageError, UserError
from bst_base.sizes import readable_size
from bst_dist.checkpoint.commands.common import add_run, add_step, select
from bst_dist.checkpoint.commands.copied_run import abandoned, ended, other_run
from bst_dist.checkpoint.directory import CheckpointError, committed, is_full, read_manifest, step_of
from bst_dist.checkpoint.object_copy import DamagedCopyError, RunCopy
from bst_dist.checkpoint.retention import CheckpointEntry, readable
from bst_dist.train.rundir import RECIPE, read_outcome, read_recipe

POLL_S = 20.0
"""Seconds between two checks of --watch for a new checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("url", metavar="URL", help="where to: s3://bucket/run, gs://…, file:///path")
    add_step(parser, "the newest full one, and a newer one of only the weights")
    parser.add_argument(
        "--keep",
        type=int,
        default=2,
        metavar="N",
        help="how many of the newest to keep there, besides those pinned in RUN (default: 2)",
    )
    parser.add_argument(
        "--watch", action="store_true", help="send each new checkpoint until the run has finished or diverged"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.watch and args.step is not None:
        raise UserError("--watch sends each new checkpoint: leave out --step")
    if args.keep < 1:
        raise UserError(f"--keep {args.keep}: at least 1")
    read_recipe(args.run)
    copy, sent = RunCopy(args.url), 0
    while True:
        try:
            over = _over(args.run)
            sent += _push(args, copy, over)
            if over or not args.watch:
                return _told(args, copy, sent)
        except (StorageError, OSError) as error:  # of the store, or of the run's own file system
            if not args.watch:
                raise
            said = StorageError.of(error) if isinstance(error, OSError) else error
            print(f"{said}; trying again in {POLL_S:.0f} s", flush=True)
        time.sleep(POLL_S)


def _over(run_dir: Path) -> bool:
    """Whether the run has finished or diverged; raises StorageError when its directory is gone from this host."""
    if not (run_dir / RECIPE).is_file():
        raise StorageError(f"{run_dir}: {RECIPE} is missing: is its file system mounted?")
    outcome = read_outcome(run_dir) or {}
    return bool(outcome.get("finished") or "diverged" in outcome)


def _told(args: argparse.Namespace, copy: RunCopy, sent: int) -> dict[str, Any]:
    if not sent:
        which = "the newest checkpoint" if args.step is None else f"checkpoint {args.step}"
        print(f"{copy.url}: {which} is already there; only the run's own files were copied")
    return {"run": str(args.run), "url": copy.url, "bytes": sent, "steps": copy.steps()}


def _push(args: argparse.Namespace, copy: RunCopy, over: bool) -> int:
    """Send what the store lacks, then remove what it need not keep; return the number of bytes sent of checkpoints.

    `over`: the run has finished or diverged.
    """
    if difference := other_run(copy, args.run):
        raise UserError(f"{copy.url}: holds another run than {args.run} ({difference}): choose another URL")
    total = 0
    while True:
        wanted = _wanted(args, over)
        new = [one for one in wanted if not copy.has(one.step, one.manifest)]
        if new or not args.watch or ended(copy, args.run):
            copy.put_files(args.run)  # first: they show which run the copy is of
        sent = [_send(copy, one) for one in new]
        total += sum(count for count in sent if count is not None)
        if None not in sent:
            break
    if wanted:
        _clean(args.run, copy, wanted, args.keep)
    return total


def _wanted(args: argparse.Namespace, over: bool) -> list[CheckpointEntry]:
    """Return the checkpoints to send: that of --step, or the newest full one and a newer one of only the weights."""
    held = readable(args.run)
    if args.step is not None or (not held and (over or not args.watch)):
        return [select(args.run, args.step)]  # or the message that there is none
    return [one for one in held if one.full][:1] + [one for one in held[:1] if not one.full]


def _send(copy: RunCopy, one: CheckpointEntry) -> int | None:
    """Send a checkpoint; return the number of bytes sent, or None when the run has removed or replaced it meanwhile."""
    try:
        sent = copy.put_checkpoint(one.path)
    except (CheckpointError, StorageError):
        if not _removed(one):
            raise
        print(f"checkpoint {one.step} was removed by the run, or replaced, while it was sent", flush=True)
        return None
    print(f"checkpoint {one.step} sent to {copy.url}, {readable_size(sent)}", flush=True)
    return sent


def _removed(one: CheckpointEntry) -> bool:
    """Whether a checkpoint is gone or another one now. If all are gone, the file system may be: that is an error."""
    try:
        return read_manifest(one.path) != one.manifest
    except CheckpointError:
        return one.path.parent.is_dir() and not one.path.is_dir()


def _clean(run_dir: Path, copy: RunCopy, wanted: Sequence[CheckpointEntry], keep: int) -> None:
    """Remove from the store what the run has abandoned, and all but the newest `keep` full checkpoints.

    Those just sent (`wanted`), those pinned in the run, and those of only the weights stay. Parts of checkpoints,
    which interrupted pushes have left, are removed unless the run still has the checkpoint: then another push may be
    sending it.
    """
    own = [step_of(path) for path in committed(run_dir)]
    for step in copy.unfinished():
        if step not in own:
            copy.remove_unfinished(step)
            print(f"checkpoint {step} removed from {copy.url} (incomplete, and the run no longer has it)", flush=True)
    there = {}
    for step in copy.steps():
        try:
            there[step] = copy.manifest(step)
        except DamagedCopyError as error:
            print(error, flush=True)
    if any(one.full for one in wanted):  # else an abandoned one may be all that a run can resume from
        for step in abandoned(run_dir, there):
            _remove(copy, step, "the run went back to an earlier step")
            del there[step]
    pinned = {step_of(path) for path in committed(run_dir) if CheckpointEntry(path, {}).pinned}
    full = [step for step, manifest in there.items() if step not in pinned and is_full(manifest)]
    for step in full[keep:]:
        if step not in [one.step for one in wanted]:
            _remove(copy, step, f"--keep {keep}")


def _remove(copy: RunCopy, step: int, why: str) -> None:
    copy.remove(step)
    print(f"checkpoint {step} removed from {copy.url} ({why})", flush=True)
