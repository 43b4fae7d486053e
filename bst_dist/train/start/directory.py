"""Checks whether a run may start or continue in a directory, from the files that the directory holds."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

from bst_base.errors import StorageError, UserError
from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import CHECKPOINTS, DAMAGED, PARTIAL, committed, entries, step_of
from bst_dist.config import Recipe, differing_values, load_recipe
from bst_dist.faults.lease import LEASE
from bst_dist.faults.stacks import STACKS
from bst_dist.report.metrics import FILE
from bst_dist.train.rundir import (
    DS_CONFIG,
    ENVIRONMENT,
    FROM_COPIES,
    OUTCOME,
    RECIPE,
    read_outcome,
    read_recipe,
    read_starts,
)
from bst_dist.train.start.changes import changes, listed

WRITTEN_BEFORE_RECIPE = (CHECKPOINTS, "heartbeats", LEASE, STACKS)
"""Entries that a start creates before it writes the recipe; older versions created heartbeats/."""
UNRELATED_SUFFIXES = (".out", ".err", ".log", ".partial")
"""Suffixes of files that may be in a new run's directory: a scheduler's logs, files of an interrupted write."""
SNAPSHOTS = "memory-rank-*.pickle"
"""Memory snapshots of a start whose memory ran out while it built the model."""
FROM_ZERO = "--from-zero (its metrics are kept in metrics.dropped.jsonl)"

# DeepSpeed settings that affect the run's numbers: how it computes, and what ZeRO quantizes. The other settings follow
# from the ranks, or say where ZeRO stores and how it sends tensors; they may change from start to start.
NUMERIC_KEYS = (
    "gradient_clipping",
    "torch_autocast",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
)
QUANTIZATION_KEYS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


class RunDirectoryError(UserError):
    """A run directory that this run must not write to."""


def check(
    run_dir: Path,
    recipe: Recipe,
    completed: dict[str, Any],
    *,
    resume: bool,
    from_zero: bool = False,
    replan: bool = False,
) -> list[str]:
    """Raise unless the run may start or continue in `run_dir`; return the settings that change from here on.

    Nothing is written. Raises `changes.OtherRunError` for another recipe. Raises RunDirectoryError for a DeepSpeed
    configuration with other numerics, for checkpoints without `resume`, and for a directory that is not a run. Another
    layout is allowed. Raises StorageError when the directory shows that checkpoints existed but this host sees none,
    unless `from_zero` is set. `replan`: as in `changes`.
    """
    if not (run_dir / RECIPE).exists():
        _require_free(run_dir)
        return []
    changed = changes(run_dir, read_recipe(run_dir), recipe, replan)
    stored = run_dir / DS_CONFIG
    if stored.exists() and (differences := _changed(json.loads(stored.read_text()), completed)):
        raise RunDirectoryError(listed(f"{run_dir}: holds a run with another DeepSpeed configuration:", differences))
    checkpoints = committed(run_dir)
    if checkpoints and not read_starts(run_dir):
        raise RunDirectoryError(
            f"{run_dir}: imported weights, which cannot be resumed: start another run from them, in another "
            f"--run-dir, with initial_weights.run={run_dir} initial_weights.step={step_of(checkpoints[0])}"
        )
    if not resume and checkpoints:
        raise RunDirectoryError(
            f"{run_dir}: already has checkpoints, up to {checkpoints[0].name}: "
            "continue it with --resume, or start a new run in another --run-dir"
        )
    if not checkpoints and not from_zero and (evidence := evidence_of_checkpoints(run_dir)):
        beside = ", ".join(entries(run_dir)) or "nothing"
        advice = "restore one of them." if DAMAGED in beside else "is its file system mounted?"
        raise StorageError(
            f"{run_dir}: {evidence}, but {socket.gethostname()} sees no checkpoint in {run_dir / CHECKPOINTS} "
            f"({beside} there): {advice} To start at step 0 anyway: {FROM_ZERO}"
        )
    return changed


def _require_free(run_dir: Path) -> None:
    """Raise RunDirectoryError if a directory without a recipe has more than logs and files of an interrupted start."""
    if checkpoints := committed(run_dir):
        raise RunDirectoryError(
            f"{run_dir}: has checkpoints, up to {checkpoints[0].name}, but no {RECIPE}: restore it, or "
            "choose another --run-dir"
        )
    paths = run_dir.iterdir() if run_dir.exists() else ()
    strange = [path.name for path in paths if not _may_precede_a_run(path)]
    if strange:
        raise RunDirectoryError(
            f"{run_dir}: not a run (no {RECIPE}) and not empty ({', '.join(sorted(strange)[:4])}): choose another "
            "with --run-dir"
        )


def _may_precede_a_run(path: Path) -> bool:
    """Whether an entry of a directory may be there before a run has written its recipe."""
    return path.name in WRITTEN_BEFORE_RECIPE or path.name.endswith(UNRELATED_SUFFIXES) or path.match(SNAPSHOTS)


def evidence_of_checkpoints(run_dir: Path) -> str | None:
    """Return the evidence, as text, that the run in a directory once had a checkpoint; None if there is none.

    A run that was killed before its first checkpoint was due never had one. Steps that a branch shares with its trunk
    do not count: their checkpoint is in the trunk's directory. Nor do starts before the last one that began the run:
    it was asked to begin it again (--from-zero).
    """
    if not (run_dir / RECIPE).exists():
        return None
    recipe = load_recipe(run_dir / RECIPE)
    first = recipe.branch.step if recipe.branch else 0
    outcome = read_outcome(run_dir) or {}
    starts = read_starts(run_dir)
    anew = max((n for n, start in enumerate(starts) if start.get("from_step", math.inf) <= first), default=0)
    resumed = (start.get("from_step", 0) for start in starts[anew:] if FROM_COPIES not in start)
    if (begun := max(resumed, default=0)) > first:
        return f"{ENVIRONMENT} has a start that resumed from step {begun}"
    if (reached := outcome.get("step", 0)) > first:
        return f"{OUTCOME} says that step {reached} was reached"
    done = max((line["step"] for line in read_lines(run_dir / FILE) if line["kind"] == "train"), default=0)
    if any(name.endswith(PARTIAL) for name in entries(run_dir)):
        return None  # killed while it wrote its first checkpoint
    for step in range(first + 1, done):
        if recipe.checkpoint.scheduled(step):
            return f"{FILE} has {done} steps and a checkpoint was due at step {step}"
    return None


def _changed(stored: dict[str, Any], completed: dict[str, Any]) -> list[str]:
    """Return the settings with other numerics in two DeepSpeed configurations, as ``key: there, given``."""
    return differing_values(_arithmetic(stored), _arithmetic(completed))


def _arithmetic(completed: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a DeepSpeed configuration that affect the run's numbers."""
    zero = completed.get("zero_optimization", {})
    rounding = {f"zero_optimization.{key}": zero.get(key, False) for key in QUANTIZATION_KEYS}
    return {key: completed.get(key) for key in NUMERIC_KEYS} | rounding
