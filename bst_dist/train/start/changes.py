"""Which settings may change when a run is resumed, which may not, and what to do instead.

Settings that do not change the numbers are free (`config.NUMBERS` lists those that do). The learning rate may change
from the resumed step on, and so may the batch, unless rows are streamed, the lengths of sequences that are planned, and
a mixture's corpora and weights that are still to come (the loader's `check` refuses others); the number of steps and
the schedule may if all steps so far would have had the same rate, or if the user says that they are planned anew. A
change is written to the ledger and the header. Anything else would be another run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_dist.checkpoint.directory import committed, step_of
from bst_dist.config import Recipe, differing
from bst_dist.train.schedule import factor
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.order.sizes import STREAMED

RATES = ("optimizer.learning_rate:", "optimizer.ssm_learning_rate:")
SCHEDULE = ("train.steps:", "schedule.")
BATCH = ("train.sequences:", "train.sequence_changes")
LENGTH = ("train.length_changes",)
WEIGHTS = ("data.weights:", "data.weight_changes:")
_CHANGING = (*RATES, *SCHEDULE, *BATCH, *LENGTH, *WEIGHTS)


class OtherRunError(UserError):
    """A run directory that holds another run than the one to resume."""


def changes(run_dir: Path, before: Recipe, now: Recipe, replan: bool = False) -> list[str]:
    """The settings that change when the run in `run_dir` is resumed, as ``field: before, now``.

    `replan`: steps already taken may have had another rate than the schedule now gives them. Raises OtherRunError for
    those that may not, with what to do instead.
    """
    found = differing(before, now)
    there = committed(run_dir)
    done = step_of(there[0]) if there else 0
    if fixed := [line for line in found if not line.startswith(_CHANGING)]:
        head = f"{run_dir}: holds a run with other settings (there, given):"
        raise OtherRunError(listed(head, fixed) + _length_from(before, now, done))
    if now.data.mode == "streaming" and (batch := [line for line in found if line.startswith(BATCH)]):
        raise OtherRunError(
            f"{run_dir}: {batch[0]} (there, given): {STREAMED}. Start a new run from the weights in another --run-dir: "
            f"initial_weights.run={run_dir} initial_weights.step=N"
        )
    if replan and now.train.steps >= done:
        return found
    first = _first_otherwise(before, now, done)
    if first is not None:
        raise OtherRunError(_way_out(run_dir, found, first, [step_of(path) for path in there], now.train.steps))
    return found


def fixed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that is the same in all checkpoints of a run."""
    return {name: value for name, value in identity.items() if not may_change(name)}


def may_change(name: str) -> bool:
    """Whether a setting may change in the course of a run."""
    return f"{name}:".startswith(_CHANGING)


def with_batch(changed: Sequence[str], data: Mapping[str, Any], sequences: int) -> list[str]:
    """What changes where a checkpoint with the loader's state `data` continues with so many sequences per step.

    A batch that changed at a later checkpoint, which is damaged or was rolled back, changes at this one.
    """
    before = data.get("rows", sequences)
    if before == sequences or any(line.startswith(BATCH) for line in changed):
        return list(changed)
    return [*changed, f"train.sequences: {before}, {sequences}"]


def _first_otherwise(before: Recipe, now: Recipe, done: int) -> int | None:
    """The first step taken so far that would have had another learning rate."""
    if now.train.steps < done:
        return now.train.steps
    return next(
        (
            step
            for step in range(done)
            if factor(before.schedule, step, before.train.steps) != factor(now.schedule, step, now.train.steps)
        ),
        None,
    )


def _length_from(before: Recipe, now: Recipe, done: int) -> str:
    """How the length that is asked for is had from a step on; empty where it is the one that there was."""
    first, length = before.train.sequence_length, now.train.sequence_length
    if first == length or not done or not isinstance(now.data, DataConfig):
        return ""
    planned = [(change.step, change.sequence_length) for change in before.train.length_changes if change.step < done]
    listing = ", ".join(f"{{step: {step}, sequence_length: {tokens}}}" for step, tokens in [*planned, (done, length)])
    return (
        f"\nThe steps so far keep their length. For {length} tokens from here on: train.sequence_length={first} "
        f"'train.length_changes=[{listing}]'; where step {done} cannot have it, the first step that can is named"
    )


def _way_out(run_dir: Path, found: list[str], first: int, steps: list[int], wanted: int) -> str:
    """What to do instead; `steps`: of the checkpoints, `wanted`: `train.steps`."""
    fitting = ", ".join(str(step) for step in sorted(steps) if step <= first) or "none"
    here = "To follow the new schedule from the newest checkpoint on, add --replan-schedule. Or: "
    return (
        f"{run_dir}: {'; '.join(found)} (there, given): step {first + 1} was already taken with another learning rate. "
        f"{here if wanted >= max(steps) else ''}Continue in another --run-dir: as a branch, "
        f"branch.run=../{run_dir.name} branch.step=N, from a checkpoint up to which the rates agree ({fitting}); or as "
        f"a new run from the weights, initial_weights.run={run_dir} initial_weights.step=N "
        f"({', '.join(map(str, sorted(steps)))})"
    )


def listed(head: str, lines: list[str], most: int = 8) -> str:
    """A message of one line, and below it the first few of the settings that it is about."""
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([head, *(f"  {line}" for line in lines[:most]), *more])
