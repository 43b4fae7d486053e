"""Branches: runs that start from a checkpoint of another run, the trunk, instead of computing those steps again.

Under the wsd schedule the rate is constant between warm-up and decay, so runs of several lengths share all steps before
their decays: one trunk without a decay, and for each length a branch that decays from one of the trunk's checkpoints.
A branch is bitwise equal to the run that its own recipe describes: the trunk only saves the first steps.

Source: Hägele et al., arXiv 2405.18392.
"""

from __future__ import annotations

import os
from pathlib import Path

from bst_base.json_lines import read_lines
from bst_base.places import with_home
from bst_dist.checkpoint.directory import CheckpointError, directory, find, read_manifest
from bst_dist.config import Recipe, differing, load_recipe
from bst_dist.faults import ledger
from bst_dist.report.metrics import FILE
from bst_dist.train.rundir import RECIPE
from bst_dist.train.schedule import factor
from bst_dist.train.start.changes import listed

# Settings in which a branch may differ from its trunk. The schedules must still agree on every shared step.
MAY_DIFFER = ("branch", "train.steps:", "schedule.")


def trunk_checkpoint(run_dir: Path, recipe: Recipe) -> Path:
    """Return the checkpoint that `recipe` branches off; raises CheckpointError unless the trunk took the same steps.

    The model, the data, the seed and the learning rate of every step before the branch must be equal.
    """
    trunk_dir, step = _trunk_dir(run_dir, recipe), recipe.branch.step
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


def shared_history(run_dir: Path, recipe: Recipe) -> tuple[list[ledger.Entry], list[float]]:
    """Return the ledger and the losses of the steps that a run shares with its trunk, and that one with its own.

    Both are empty for a run that is no branch. What the trunk no longer has is left out: a branch that has checkpoints
    of its own can be resumed without it.
    """
    if recipe.branch is None:
        return [], []
    trunk_dir, step = _trunk_dir(run_dir, recipe), recipe.branch.step
    if not (trunk_dir / RECIPE).is_file():
        return [], []
    entries, losses = shared_history(trunk_dir, load_recipe(trunk_dir / RECIPE))
    lines = read_lines(trunk_dir / FILE)
    losses += [line["loss_nats"] for line in lines if line["kind"] == "train" and line["step"] <= step]
    if (checkpoint := find(trunk_dir, step)) is not None:
        entries += ledger.read(trunk_dir, step, read_manifest(checkpoint)["skipped"])
    return entries, losses


def _trunk_dir(run_dir: Path, recipe: Recipe) -> Path:
    # normpath and not resolve: the branch's own directory may not exist yet.
    return Path(os.path.normpath(run_dir / with_home(recipe.branch.run)))
