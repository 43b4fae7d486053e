"""Loads the state that a run starts or continues from: local copies, a checkpoint of the run or its trunk, or none."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from bst_dist.checkpoint.agreement import each_or_raise, of_first
from bst_dist.checkpoint.directory import CheckpointError, step_of
from bst_dist.checkpoint.local.copies import LocalCopies
from bst_dist.checkpoint.retention import abandon
from bst_dist.checkpoint.snapshot import Position, Snapshots
from bst_dist.faults import ledger
from bst_dist.faults.guard import DivergedError, Guard
from bst_dist.parallel.ranks import Ranks
from bst_dist.train.start.branch import shared_history, trunk_checkpoint
from bst_dist.train.start.changes import with_batch
from bst_dist.train.start.directory import FROM_ZERO, evidence_of_checkpoints
from bst_dist.train.start.request import Request, Start
from bst_dist.train.step import Trainer


def begin_at(
    request: Request, start: Start, snapshots: Snapshots, copies: LocalCopies | None, ranks: Ranks, loaded: bool
) -> tuple[Position, str | None]:
    """Load the state that the run starts from, and return its position.

    With --resume this is the newest of the run's local copies and checkpoints. Otherwise, or if there is none, it is
    the trunk's checkpoint for a branch, else nothing. Also returns a description of the local copies, if they were
    loaded. `loaded`: whether the model was built with the recipe's initial weights. Raises CheckpointError on all ranks
    when steps were taken and none of their checkpoints is valid.
    """
    position, local = _from_copies(start, copies, ranks) if copies and request.resume else (None, None)
    if position is None:
        position = _newest(start, snapshots, ranks, own=request.resume)
    if position is not None:
        # Raises UserError for another order.
        each_or_raise(ranks, lambda: start.objective.loader(start.mesh(ranks)).load_state_dict(position.data))
        return position, local
    initial = start.recipe.initial_weights
    evidence = of_first(ranks, lambda: evidence_of_checkpoints(start.run_dir))
    if (evidence and not request.from_zero) or (initial and not loaded):
        raise CheckpointError(
            f"{start.run_dir}: {evidence or 'it had a checkpoint'}, and none of its checkpoints is valid; restore one, "
            f"or start at step 0 with {FROM_ZERO}"
        )
    if initial:
        ranks.print_first(f"starting from the weights of step {initial.step} of {initial.run}")
    if request.resume:
        ranks.print_first(f"no checkpoint in {start.run_dir} yet: starting at step 0")
    return Position(step=0, tokens=0, data={}, carried=[]), None


def _from_copies(start: Start, copies: LocalCopies, ranks: Ranks) -> tuple[Position | None, str | None]:
    """Load the newest local copies, if they are at least as new as the newest checkpoint.

    Returns the position and a description of the copies; (None, None) if no copies are loaded.
    """

    @cache
    def shown() -> set[int]:
        return {line["step"] for line in start.reported() if line["kind"] in ("train", "skipped")}

    # Local copies are refused when settings change: the allowed changes were decided from the checkpoints.
    refusal = f"{'; '.join(start.changed)} (before, from here on)" if start.changed else None
    loaded = copies.find(lambda step: step in shown(), refusal)
    if loaded is None:
        return None, None
    ranks.print_first(f"resumed from step {loaded[0].step} of {loaded[1]}")
    return loaded


def roll_back(
    start: Start,
    snapshots: Snapshots,
    copies: LocalCopies | None,
    trainer: Trainer,
    entry: ledger.Entry,
    data: dict[str, Any],
) -> Position:
    """Load the last scheduled checkpoint, to continue from it with the data after the rejected step.

    `data`: the loader's state after the rejected step. That of the checkpoint does not know batch sizes that changed at
    a later resume, so with it rows would be read again, the bad ones too, or left out unseen. Raises DivergedError when
    there is no scheduled checkpoint yet.
    """
    ranks = trainer.ranks
    ranks.print_first(f"{entry.cause}: rolling back to the last checkpoint and skipping the data up to that step")
    before = _newest(start, snapshots, ranks, scheduled=True)
    if before is None:
        trainer.guard.ledger.add(replace(entry, action="stop"))
        raise DivergedError(f"{entry.cause}, and there is no checkpoint yet to roll back to: that step was not taken")
    trainer.guard.ledger.add(replace(entry, back_to=before.step))
    if copies:
        copies.drop()
    if ranks.first:
        abandon(start.run_dir, before.step)
    # The carried states are dropped: they belong to data that does not precede what the rows read now.
    return replace(before, data=data, skipped=entry.data_step - before.step, carried=[])


def guard_of(start: Start, ranks: Ranks, position: Position, local: str | None = None) -> Guard:
    """Return the guard of a run that continues from `position`, with the losses and ledger from the run's files.

    A branch has those of its trunk too, up to its first step: it decides as the run does that its recipe describes.
    `local`: a description of the local copies that the run was resumed from, for the ledger.
    """
    seen = None
    if ranks.first:
        of_trunk, losses = shared_history(start.run_dir, start.recipe)
        losses += [line["loss_nats"] for line in start.reported() if line["kind"] == "train"]
        entries = ledger.read(start.run_dir, position.step, position.skipped)
        seen = entries, of_trunk, losses[-start.recipe.guard.spike_window :]
    entries, of_trunk, losses = ranks.broadcast_object(seen)
    book = ledger.Ledger(entries, start.run_dir / ledger.FILE if ranks.first else None, of_trunk)
    cause = "; ".join(changed_at(start, position))
    causes = [entry.cause for entry in entries if entry.action == ledger.CHANGE]
    if cause and cause not in causes[-1:]:
        book.add(ledger.Entry(position.step, position.skipped, cause, ledger.CHANGE))
    if local:
        book.add(ledger.Entry(position.step, position.skipped, f"resumed from {local}", ledger.RESUMED))
    return Guard(start.recipe.guard, book, losses)


def changed_at(start: Start, position: Position) -> list[str]:
    """Return the settings that change from this position on, as ``field: before, now``."""
    sequences = start.recipe.train.batches.at(position.step + position.skipped)
    return with_batch(start.changed, position.data, sequences)


def _newest(
    start: Start, snapshots: Snapshots, ranks: Ranks, own: bool = True, scheduled: bool = False
) -> Position | None:
    """Load the run's newest valid checkpoint (if `own`), else the trunk's for a branch, else nothing (None).

    `scheduled`: consider only checkpoints of the run at scheduled steps.
    """
    checkpoint, damaged = snapshots.newest(scheduled) if own else (None, [])
    for reason in damaged:
        then = f"resuming from {step_of(checkpoint)}" if checkpoint else "no older checkpoint is valid"
        ranks.print_first(f"{reason}; {then}")
    if checkpoint is not None:
        position = snapshots.load(checkpoint)
    elif start.recipe.branch is not None:
        checkpoint = trunk_checkpoint(start.run_dir, start.recipe)
        snapshots.require_whole(checkpoint)
        position = snapshots.load(checkpoint, of_trunk=True)
    else:
        return None
    ranks.print_first(f"resumed from step {position.step} of {checkpoint}")
    if change := snapshots.change(checkpoint):
        ranks.print_first(f"layout changed: {change}")
    return position
