"""Branches: runs that start from a checkpoint of another run, the trunk, instead of computing those steps again.

Under the wsd schedule the rate is constant between warm-up and decay, so runs of several lengths share all steps before
their decays: one trunk without a decay, and for each length a branch that decays from one of the trunk's checkpoints.
A branch is bitwise equal to the run that its own recipe describes: the trunk only saves the first steps.

Source: Hägele et al., arXiv 2405.18392.
"""

from __future__ import annotations

import os
from pathlib import Path

from bst_base.places import with_home
from bst_dist.checkpoint.directory import CheckpointError, directory, find
from bst_dist.config import Recipe, differing, load_recipe
from bst_dist.train.rundir import RECIPE
from bst_dist.train.schedule import factor
from bst_dist.train.start.changes import listed

# Settings in which a branch may differ from its trunk. The schedules must still agree on every shared step.
MAY_DIFFER = ("branch", "train.steps:", "schedule.")


def trunk_checkpoint(run_dir: Path, recipe: Recipe) -> Path:
    """Return the checkpoint that `recipe` branches off; raises CheckpointError unless the trunk took the same steps.

    The model, the data, the seed and the learning rate of every step before the branch must be equal.
    """
    # normpath and not resolve: the branch's own directory may not exist yet.
    trunk_dir = Path(os.path.normpath(run_dir / with_home(recipe.branch.run)))
    step = recipe.branch.step
    checkpoint = find(trunk_dir, step)
    if checkpoint is None:
        raise CheckpointError(
            f"{run_dir}: branches off {directory(trunk_dir, step)}, which does not exist: "
            f"train the trunk first, with checkpoint.at: [{step}]"
        )
    trunk = load_recipe(trunk_dir / RECIPE)
    if differences := [line for line in differing(trunk, recipe) if not line.startswith(MAY_DIFFER)]:
        head = f"{run_dir}: cannot branch off {trunk_dir}; these settings differ (there, here):"
        raise CheckpointError(listed(head, differences))
    for shared in range(step):
        rate = factor(trunk.schedule, shared, trunk.train.steps)
        if rate != factor(recipe.schedule, shared, recipe.train.steps):
            raise CheckpointError(
                f"{run_dir}: branches off step {step} of {trunk_dir}, but their learning rates differ from step "
                f"{shared} on: neither run may decay before step {step} (the trunk: schedule.decay_fraction 0)"
            )
    return checkpoint
