"""What must be right before a rank is started: checked by `bst train` on its own, and by every rank again."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_base.settings import ConfigError
from bst_base.shipped import RECIPES, names
from bst_dist.config import Recipe, deepspeed_file, load_recipe, spread_of
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.ranks import Ranks
from bst_dist.plan.rehearse import rehearse
from bst_dist.report.metrics import FILE, read_lines
from bst_dist.report.writers import require as require_writer
from bst_dist.train import rundir
from bst_dist.train.config import ScheduleConfig
from bst_dist.train.objective import Objective, open_objective
from bst_dist.train.start import directory
from data_pipeline.serve.spread import Spread


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    recipe: Path
    overrides: Sequence[str]
    run_dir: Path | None
    resume: bool
    until: int | None
    """Stop after this many steps in all, with a checkpoint, as if killed politely; None: the recipe's steps."""
    from_zero: bool = False
    """Begin at step 0 although the run directory shows steps and no checkpoint is there."""
    replan: bool = False
    """Follow another schedule from the resumed step on, although the steps before had other rates than it gives."""


@dataclass(frozen=True)
class Start:
    """A run that may begin: everything resolved, nothing written yet."""

    recipe: Recipe
    run_dir: Path
    objective: Objective
    completed: dict[str, Any]
    """DeepSpeed's configuration."""
    spread: Spread
    """The sequences of a step over the ranks."""
    until: int
    changed: Sequence[str] = ()
    """Settings that differ from those of the start before, as ``field: before, now``."""

    def mesh(self, ranks: Ranks) -> Mesh:
        """Where this rank stands among the data-parallel and the sequence-parallel ranks."""
        return Mesh(ranks.world, ranks.rank, self.recipe.parallel.sp)

    def reported(self) -> list[dict[str, Any]]:
        """What the run has reported so far."""
        return read_lines(self.run_dir / FILE)


def of_run(request: Request) -> Request:
    """The request to resume a run, given by its directory: its own recipe, with the overrides of its start.

    Raises UserError when the directory holds no run, or is not to be resumed.
    """
    run_dir = request.recipe
    if not (run_dir / rundir.RECIPE).is_file():
        raise UserError(f"{run_dir}: a directory without a run ({rundir.RECIPE} is missing); give a recipe's YAML file")
    if request.run_dir not in (None, run_dir):
        raise UserError(
            f"{run_dir} is a run, so it continues there: leave out --run-dir, or start a new run from "
            f"{run_dir / rundir.RECIPE}"
        )
    if not request.resume:
        raise UserError(f"{run_dir} is a run: continue it with --resume")
    return replace(request, recipe=run_dir / rundir.RECIPE, run_dir=run_dir)


def load(request: Request) -> Recipe:
    """The recipe with its overrides, valid in itself; raises UserError."""
    _require_there(request)
    recipe = load_recipe(request.recipe, request.overrides)
    _require_reached(recipe, str(request.recipe), given=request.recipe.name != rundir.RECIPE)
    return recipe


def _require_there(request: Request) -> None:
    """Raise UserError for what can only have been meant as the directory of a run, and is none."""
    given = request.recipe
    if given.exists() or given.suffix or (given.parent == Path() and not request.resume):
        return
    recipes = names(RECIPES)
    if str(given) in recipes:
        return
    near = rundir.nearest(given) or next(iter(difflib.get_close_matches(str(given), recipes, n=1)), None)
    raise UserError(f"no such run directory or recipe: {given}" + (f"; did you mean {near}?" if near else ""))


def _require_reached(recipe: Recipe, where: str, given: bool) -> None:
    """Raise ConfigError for steps that the run never comes to.

    `given`: by a user, so its warm-up counts too; in a run's own recipe it was accepted before. The default warm-up is
    not refused: nobody asked for it, and recipes that programs write have it filled in.
    """
    steps, schedule = recipe.train.steps, recipe.schedule
    if given and schedule.warmup_steps > steps and schedule.warmup_steps != ScheduleConfig().warmup_steps:
        raise ConfigError(
            f"{where}: schedule.warmup_steps {schedule.warmup_steps} is longer than the run of {steps} steps "
            f"(train.steps): the learning rate would never reach its peak; at most {steps}"
        )
    if beyond := [step for step in recipe.checkpoint.at if step > steps]:
        raise ConfigError(f"{where}: checkpoint.at {beyond[0]} is after the run's last step, {steps} (train.steps)")


def resolve(recipe: Recipe, request: Request, world: int) -> Start:
    """Check `recipe` against the ranks, the corpus, the DeepSpeed file and the run directory; raises UserError."""
    spread = spread_of(recipe, world)
    objective = open_objective(recipe)
    recipe = objective.recipe
    _require_slices(recipe, spread)
    for name in recipe.log.writers:
        require_writer(name)
    completed = _complete(recipe, world, spread)
    run_dir = request.run_dir or Path("runs") / recipe.name
    changed = directory.check(run_dir, recipe, completed, request.resume, request.from_zero, request.replan)
    until = min(request.until or recipe.train.steps, recipe.train.steps)
    return Start(recipe, run_dir, objective, completed, spread, until, changed)


def _require_slices(recipe: Recipe, spread: Spread) -> None:
    """Raise SequenceParallelError, with the reason, when a layer cannot be computed in slices of this length."""
    sp, train = recipe.parallel.sp, recipe.train
    if sp > 1:
        documents = recipe.data.documents
        for length in sorted({train.slice_tokens or length for _, length in train.lengths}):
            rehearse(recipe.model, sp, spread.micro_rows, length // sp, documents=documents, stream=train.slices > 1)


def _complete(recipe: Recipe, world: int, spread: Spread) -> dict[str, Any]:
    from bst_dist.train import deepspeed_json  # imports DeepSpeed, which takes longer than all other checks together

    path = deepspeed_file(recipe)
    train = recipe.train
    backward_passes = spread.micro_batches * train.slices  # DeepSpeed knows of no slices: each is a micro-batch to it
    intent = deepspeed_json.Intent(
        world, spread.micro_rows, backward_passes, train.gradient_clipping, train.precision, recipe.optimizer.kind
    )
    return deepspeed_json.complete(deepspeed_json.read(path), intent, where=str(path))
