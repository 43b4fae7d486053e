"""The status of a run, from the files in its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bst_dist.faults.lease import is_held
from bst_dist.train.rundir import read_outcome


@dataclass(frozen=True)
class TrainingStatus:
    """The status of a run as a keyword, and as a line for the terminal."""

    word: str
    """"finished", "running", "stopped", "diverged" or "broken off"."""
    text: str


def training_status(run_dir: Path, step: int, steps: int | None) -> TrainingStatus:
    """Return the status of a run that has taken `step` of `steps` steps (None: not known from its recipe)."""
    reached = f"step {step:,}" + ("" if steps is None else f" of {steps:,}")
    outcome = read_outcome(run_dir)
    if outcome is None:  # the last start is still running, or was killed
        if is_held(run_dir):
            return TrainingStatus("running", f"running, {reached}")
        return TrainingStatus("broken off", f"interrupted after {reached}: killed or failed" if step else "no step yet")
    if outcome.get("finished"):
        return TrainingStatus("finished", f"finished, {reached}")
    if diverged := outcome.get("diverged"):
        return TrainingStatus("diverged", f"diverged after {reached}: {diverged}")
    return TrainingStatus(
        "stopped", f"stopped{' by ' + outcome['stopped'] if 'stopped' in outcome else ''} after {reached}"
    )
