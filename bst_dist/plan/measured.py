"""Calibration of the time model: measured step times of a run, compared with the plan of that run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bst_base.errors import UserError
from bst_base.json_lines import read_lines
from bst_dist.config import Recipe
from bst_dist.plan.accelerators import Accelerator
from bst_dist.plan.search import Planner
from bst_dist.plan.speed import Cluster
from bst_dist.report.metrics import FILE
from bst_dist.report.warm_up import WARM_UP_STEPS, by_start
from bst_dist.train.rundir import read_recipe, require_starts

FEWEST_STEPS = 10
"""Fewest measured steps that give a reliable step time."""


@dataclass(frozen=True)
class Measured:
    """Measured step times of one start of a run."""

    run: Path
    seconds: tuple[float, float, float]
    """Step time: median, 10th and 90th percentile."""
    steps: int
    cluster: Cluster
    """The cluster that they ran on."""
    planned_s: float
    """Step time in seconds by the time model."""

    @property
    def slower(self) -> float:
        """Measured over planned step time."""
        return self.seconds[0] / self.planned_s

    def __str__(self) -> str:
        middle, fast, slow = self.seconds
        ranks = "1 rank" if self.cluster.world == 1 else f"{self.cluster.world:,} ranks"
        return (
            f"all planned times below are multiplied by {self.slower:.3g}: {self.run} took {middle:.3g} s per step on "
            f"{ranks} (median of {self.steps:,} steps; 10 to 90 %: {fast:.3g} to {slow:.3g}), the plan was "
            f"{self.planned_s:.3g} s"
        )


def measure(run: Path, device: Accelerator) -> Measured:
    """Return the step times of the latest start of a run that took enough steps; `device` is what it ran on.

    Raise UserError if there is no run, if it was never started, if it ran on another device, or if no start took
    enough steps.
    """
    recipe = read_recipe(run)
    starts = require_starts(run)
    lines = [line for line in read_lines(run / FILE) if line["kind"] == "train"]
    every = [(start, _times(own, recipe)) for start, own in zip(starts, by_start(lines, starts), strict=True)]
    enough = [(start, times) for start, times in every if len(times) >= FEWEST_STEPS]
    if not enough:
        raise UserError(
            f"{run}: no start took {FEWEST_STEPS} steps after its first {WARM_UP_STEPS}: too few to "
            "measure the time of a step"
        )
    start, times = enough[-1]
    _require(run, start.get("device"), device)
    nodes = len(start["hosts"])
    cluster = Cluster(nodes, start["ranks"] // nodes, device)
    middle, fast, slow = (float(np.quantile(times, share)) for share in (0.5, 0.1, 0.9))
    return Measured(run, (middle, fast, slow), len(times), cluster, Planner(recipe, cluster).as_written().speed.total)


def _times(lines: Sequence[dict], recipe: Recipe) -> list[float]:
    """Return the step times of one start, up to the first change of batch size or length, without warm-up steps."""
    changes = [change.step for change in (*recipe.train.sequence_changes, *recipe.train.length_changes)]
    own = [line["step_time_s"] for line in lines if line["step"] <= min(changes, default=line["step"])]
    return own[WARM_UP_STEPS:]


def _require(run: Path, ran_on: str | None, device: Accelerator) -> None:
    """Raise UserError if the run is known to have run on another device."""
    if ran_on is not None and device.device and not device.is_called(ran_on):
        raise UserError(
            f"{run} ran on {ran_on}, not on {device.title}: --gpu names what it ran on; devices of your own are added "
            "with --accelerators FILE"
        )
