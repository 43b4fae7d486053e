"""Branches: runs that start from a checkpoint of another run, the trunk, instead of computing those steps again.

Under the wsd schedule the rate is constant between warm-up and decay, so runs of several lengths share all steps before
their decays: one trunk without a decay, and for each length a branch that decays from one of the trunk's checkpoints.
A branch is bitwise equal to the run that its own recipe describes: the trunk only saves the first steps.

Source: Hägele et al., arXiv 2405.18392.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bst_dist.checkpoint.directory import CheckpointError, directory, find
from bst_dist.config import Recipe, differing, load_recipe
from bst_dist.train.rundir import RECIPE
from bst_dist.train.schedule import factor

# Settings in which a branch may differ from its trunk. The schedules must still agree on every shared step.
OWN = ("branch", "train.steps:", "schedule.")


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a branch begins at, and the recipe of its trunk."""

    checkpoint: Path
    trunk: Recipe


def origin(run_dir: Path, recipe: Recipe) -> Origin:
    """Return the checkpoint that `recipe` branches off; raises CheckpointError unless the trunk took the same steps.

    The model, the data, the seed and the learning rate of every step before the branch must be equal.
    """
    # normpath and not resolve: the branch's own directory may not exist yet.
    trunk_dir = Path(os.path.normpath(run_dir / recipe.branch.run))
    step = recipe.branch.step
    checkpoint = find(trunk_dir, step)
    if checkpoint is None:
        raise CheckpointError(
            f"{run_dir}: branches off {directory(trunk_dir, step)}, which does not exist: "
            f"train the trunk first, with checkpoint.at: [{step}]"
        )
    trunk = load_recipe(trunk_dir / RECIPE)
    if found := [line for line in differing(trunk, recipe) if not line.startswith(OWN)]:
        raise CheckpointError(
            "\n".join([f"{run_dir}: cannot branch off {trunk_dir}; these settings differ (there, here):", *found[:8]])
        )
    for shared in range(step):
        there = factor(trunk.schedule, shared, trunk.train.steps)
        if there != factor(recipe.schedule, shared, recipe.train.steps):
            raise CheckpointError(
                f"{run_dir}: branches off step {step} of {trunk_dir}, but their learning rates differ from step "
                f"{shared} on: neither run may decay before step {step} (the trunk: schedule.decay_fraction 0)"
            )
    return Origin(checkpoint, trunk)
