"""Which settings may change when a run is resumed, which may not, and what to do instead.

Settings that do not affect the numbers may change freely (`config.NUMERIC_SECTIONS` lists those that do). From the
resumed step on these may change as well:

- the learning rate;
- the batch size, unless rows are streamed;
- length changes at later steps, and a mixture's corpora and weights at later steps (the loader's `load_state_dict`
  rejects changes of the past);
- the number of steps and the schedule, if all steps so far would have had the same rate, or with --replan-schedule.

A change is recorded in the ledger and the header. Any other change would make it a different run.
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
    """A run directory whose run has other settings than the one to resume."""


def changes(run_dir: Path, before: Recipe, now: Recipe, replan: bool = False) -> list[str]:
    """Return the settings that change when the run in `run_dir` is resumed, as ``field: before, now``.

    `replan`: accept that steps already taken had other rates than the new schedule gives them. Raises OtherRunError,
    with what to do instead, for settings that may not change.
    """
    changed = differing(before, now)
    checkpoints = committed(run_dir)
    done = step_of(checkpoints[0]) if checkpoints else 0
    if fixed := [line for line in changed if not line.startswith(_CHANGING)]:
        head = f"{run_dir}: holds a run with other settings (there, given):"
        raise OtherRunError(listed(head, fixed) + _length_from(before, now, done))
    if now.data.mode == "streaming" and (batch := [line for line in changed if line.startswith(BATCH)]):
        raise OtherRunError(
            f"{run_dir}: {batch[0]} (there, given): {STREAMED}. Start a new run from the weights in another --run-dir: "
            f"initial_weights.run={run_dir} initial_weights.step=N"
        )
    if replan and now.train.steps >= done:
        return changed
    first = _first_step_with_other_rate(before, now, done)
    if first is not None:
        steps = [step_of(path) for path in checkpoints]
        raise OtherRunError(_advice_on_schedule(run_dir, changed, first, steps, now.train.steps))
    return changed


def fixed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an identity that are the same in all checkpoints of a run."""
    return {name: value for name, value in identity.items() if not may_change(name)}


def may_change(name: str) -> bool:
    """Whether a setting may change during a run."""
    return f"{name}:".startswith(_CHANGING)


def with_batch(changed: Sequence[str], data: Mapping[str, Any], sequences: int) -> list[str]:
    """Add to `changed` the change of the batch size, when a checkpoint continues with `sequences` per step.

    `data`: the loader's state in that checkpoint. This is needed when the batch had changed at a later checkpoint that
    is damaged or was rolled back: the change then happens at this one.
    """
    before = data.get("rows", sequences)
    if before == sequences or any(line.startswith(BATCH) for line in changed):
        return list(changed)
    return [*changed, f"train.sequences: {before}, {sequences}"]


def _first_step_with_other_rate(before: Recipe, now: Recipe, done: int) -> int | None:
    """Return the first of the `done` steps that would have had another learning rate; None if there is none."""
    if now.train.steps < done:
        return now.train.steps
    for step in range(done):
        if factor(before.schedule, step, before.train.steps) != factor(now.schedule, step, now.train.steps):
            return step
    return None


def _length_from(before: Recipe, now: Recipe, done: int) -> str:
    """Return advice on how to change the sequence length from step `done` on; empty if the length did not change."""
    first, length = before.train.sequence_length, now.train.sequence_length
    if first == length or not done or not isinstance(now.data, DataConfig):
        return ""
    planned = [(change.step, change.sequence_length) for change in before.train.length_changes if change.step < done]
    listing = ", ".join(f"{{step: {step}, sequence_length: {tokens}}}" for step, tokens in [*planned, (done, length)])
    return (
        f"\nThe steps so far keep their length. For {length} tokens from here on: train.sequence_length={first} "
        f"'train.length_changes=[{listing}]'; where step {done} cannot have it, the first step that can is named"
    )


def _advice_on_schedule(run_dir: Path, changed: list[str], first: int, steps: list[int], wanted: int) -> str:
    """Return the error message with what to do instead.

    `first`: the first step with another rate; `steps`: those of the checkpoints; `wanted`: the new `train.steps`.
    """
    fitting = ", ".join(str(step) for step in sorted(steps) if step <= first) or "none"
    here = "To follow the new schedule from the newest checkpoint on, add --replan-schedule. Or: "
    return (
        f"{run_dir}: {'; '.join(changed)} (there, given): step {first + 1} was already taken with another learning "
        f"rate. {here if wanted >= max(steps) else ''}Continue in another --run-dir: as a branch, "
        f"branch.run=../{run_dir.name} branch.step=N, from a checkpoint up to which the rates agree ({fitting}); or as "
        f"a new run from the weights, initial_weights.run={run_dir} initial_weights.step=N "
        f"({', '.join(map(str, sorted(steps)))})"
    )


def listed(head: str, lines: list[str], most: int = 8) -> str:
    """Return the message `head` followed by the first `most` lines, one setting each."""
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([head, *(f"  {line}" for line in lines[:most]), *more])
