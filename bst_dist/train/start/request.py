"""The checks before training: `bst train` runs them before it starts ranks, and the ranks run them again together."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bst_base.errors import StorageError, UserError, nearest
from bst_base.json_lines import read_lines
from bst_base.settings import ConfigError
from bst_base.shipped import RECIPES, names
from bst_base.stopping import Stopped
from bst_dist.config import Recipe, deepspeed_file, load_recipe, spread_of
from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.ranks import Ranks
from bst_dist.plan.rehearse import rehearse
from bst_dist.report.metrics import FILE
from bst_dist.report.writers import require as require_writer
from bst_dist.train import rundir
from bst_dist.train.config import ScheduleConfig
from bst_dist.train.objective import Objective, open_objective
from bst_dist.train.start import directory
from data_pipeline.serve.loader import EVERY_SHARD
from data_pipeline.serve.spread import Spread
from data_pipeline.synthetic.config import SyntheticConfig


@dataclass(frozen=True)
class Request:
    """The user's request: the arguments of `bst train`."""

    recipe: Path
    overrides: Sequence[str]
    run_dir: Path | None
    resume: bool
    until: int | None
    """Stop with a checkpoint after this many steps in total; None: after the recipe's steps."""
    from_zero: bool = False
    """Begin at step 0 even if the run directory shows steps but has no checkpoint."""
    replan: bool = False
    """Follow a changed schedule from the resumed step on, although it gives the earlier steps other rates."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A run that passed all checks. Everything is resolved; nothing is written yet."""

    recipe: Recipe
    run_dir: Path
    objective: Objective
    completed: dict[str, Any]
    """The completed DeepSpeed JSON."""
    spread: Spread
    """How the sequences of a step are divided over the ranks."""
    until: int
    """The step after which this start ends."""
    changed: Sequence[str] = ()
    """Settings that differ from those of the previous start, as ``field: before, now``."""

    def mesh(self, ranks: Ranks) -> Mesh:
        """Return this rank's place in the dp × sp mesh."""
        return Mesh(ranks.world, ranks.rank, self.recipe.parallel.sp)

    def reported(self) -> list[dict[str, Any]]:
        """Return the lines of the run's metrics so far."""
        return read_lines(self.run_dir / FILE)


def of_run(request: Request) -> Request:
    """Return the request for a run given by its directory: with the resolved recipe in it as the recipe.

    Raises UserError when the directory holds no run, or without --resume.
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
    """Read the recipe with its overrides and validate it on its own; raises UserError."""
    _require_there(request)
    recipe = load_recipe(request.recipe, request.overrides)
    _require_reached(recipe, str(request.recipe), given=request.recipe.name != rundir.RECIPE)
    return recipe


def _require_there(request: Request) -> None:
    """Raise UserError for a recipe argument that looks like a run directory or a recipe's name and does not exist."""
    given = request.recipe
    if given.exists() or given.suffix or (given.parent == Path() and not request.resume):
        return
    recipes = names(RECIPES)
    if str(given) in recipes:
        return
    near = rundir.nearest_run(given) or nearest(str(given), recipes)
    raise UserError(f"no such run directory or recipe: {given}" + (f"; did you mean {near}?" if near else ""))


def _require_reached(recipe: Recipe, where: str, given: bool) -> None:
    """Raise ConfigError for settings at steps that the run never reaches.

    `given`: the user wrote the recipe, so its warm-up is checked too; in a run's own recipe it was accepted before. The
    default warm-up is always accepted: the user did not set it, and recipes written by programs have it filled in.
    """
    steps, schedule = recipe.train.steps, recipe.schedule
    if given and schedule.warmup_steps > steps and schedule.warmup_steps != ScheduleConfig().warmup_steps:
        raise ConfigError(
            f"{where}: schedule.warmup_steps {schedule.warmup_steps} is longer than the run of {steps} steps "
            f"(train.steps): the learning rate would never reach its peak; at most {steps}"
        )
    if beyond := [step for step in recipe.checkpoint.at if step > steps]:
        raise ConfigError(f"{where}: checkpoint.at {beyond[0]} is after the run's last step, {steps} (train.steps)")


def resolve_together(recipe: Recipe, request: Request, ranks: Ranks) -> Start:
    """Return what `resolve` returns, on all ranks of a run, which share the check of the shards' sizes.

    When one rank finds an error, raises it on all ranks, as UserError, StorageError or Stopped. They name that rank and
    its host, unless all have found the same. Stopped is only raised when no rank has found anything else.
    """
    start, problem = None, None
    try:
        start = resolve(recipe, request, ranks.world, slice(ranks.rank, None, ranks.world))
    except UserError as error:
        problem = error
    except OSError as error:
        if error.filename is None:  # a socket or a process, not a file that this host cannot read
            raise
        problem = StorageError.of(error)
    everyone = ranks.all_gather_object(
        None if problem is None else (_kind(problem), str(problem), socket.gethostname())
    )
    if start is not None and not any(everyone):
        return start
    if problem is not None and len({report and report[1] for report in everyone}) == 1:
        raise problem
    errors = {rank: report for rank, report in enumerate(everyone) if report is not None}
    others = [rank for rank, (kind, *_) in errors.items() if kind is not Stopped]
    rank = min(others or errors)
    kind, message, host = errors[rank]
    if kind is not Stopped:
        message = f"rank {rank}: {message}" if message.startswith(f"{host} ") else f"rank {rank} on {host}: {message}"
    raise kind(message) from problem


def _kind(error: UserError) -> type[UserError]:
    """Return the type to raise on the other ranks: one for each exit status."""
    for kind in (StorageError, Stopped):
        if kind.exit_status == error.exit_status:
            return kind
    return UserError


def resolve(recipe: Recipe, request: Request, world: int, checked: slice = EVERY_SHARD) -> Start:
    """Check `recipe` against the ranks, the corpus, the DeepSpeed file and the run directory, and return the Start.

    `checked`: the shards of each corpus whose sizes are checked (`open_corpora`). Raises UserError.
    """
    spread = spread_of(recipe, world)
    objective = open_objective(recipe, checked)
    recipe = objective.recipe
    _require_slices(recipe, spread)
    for name in recipe.log.writers:
        require_writer(name)
    completed = _complete(recipe, world, spread)
    run_dir = request.run_dir or Path("runs") / recipe.name
    return Start(
        recipe=recipe,
        run_dir=run_dir,
        objective=objective,
        completed=completed,
        spread=spread,
        until=min(request.until or recipe.train.steps, recipe.train.steps),
        changed=directory.check(
            run_dir,
            recipe,
            completed,
            resume=request.resume,
            from_zero=request.from_zero,
            replan=request.replan,
        ),
    )


def _require_slices(recipe: Recipe, spread: Spread) -> None:
    """Raise SequenceParallelError, with the reason, when a layer cannot be computed on a rank's slices."""
    sp, train, data = recipe.parallel.sp, recipe.train, recipe.data
    if sp > 1:
        # Evaluations read a synthetic row whole, in slices of the length that a step reads of it.
        whole = isinstance(data, SyntheticConfig) and data.row(train.sequence_length) > train.sequence_length
        stream = train.carry or train.slices > 1 or whole
        for length in sorted({train.slice_tokens or length for length in train.lengths.values}):
            rehearse(recipe.model, sp, spread.micro_rows, length // sp, documents=data.documents, stream=stream)


def _complete(recipe: Recipe, world: int, spread: Spread) -> dict[str, Any]:
    from bst_dist.train import deepspeed_json  # here, since importing DeepSpeed takes longer than all other checks

    path = deepspeed_file(recipe)
    train = recipe.train
    backward_passes = spread.micro_batches * train.slices  # for DeepSpeed each slice is a micro-batch
    intent = deepspeed_json.Intent(
        world, spread.micro_rows, backward_passes, train.gradient_clipping, train.precision, recipe.optimizer.kind
    )
    completed = deepspeed_json.complete(deepspeed_json.read(path), intent, where=str(path))
    offload = completed["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        raise deepspeed_json.DeepSpeedConfigError(
            f"{path}: zero_optimization.offload_optimizer.device nvme: checkpoints cannot store optimizer states that "
            "are on a drive; write cpu there, or choose zero3_cpu_offload"
        )
    return completed
