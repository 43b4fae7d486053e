"""The combinations to verify: all settings that may change how a step is computed, but must not change its result."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from bst_base.settings import ConfigError, parse
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.cluster.local import default_ranks
from bst_dist.config import Recipe, deepspeed_file
from bst_dist.model.config import ContextConfig
from bst_dist.parallel.mesh import Mesh
from bst_dist.plan.rehearse import rehearse
from bst_dist.study.lra.config import LongRangeConfig
from bst_dist.verify.shrink import shrink

MOST_SLICES = 4
"""Maximum number of slices per sequence in the small copy."""


@dataclass(frozen=True)
class Combination:
    """One way to compute a step."""

    model: str
    """The context variant, SH, MH or MF; for other models the mixer."""
    precision: str
    deepspeed: str
    """Path of the strategy's file."""
    sp: int
    checkpointing: str
    accumulation: int
    """Micro-batches per rank."""
    slices: int = 1
    """Slices per sequence."""
    edges: str = "device"
    """Where the edges of slices are kept, if there are several slices (`train.edges`)."""
    edges_every: int = 1
    """Keep one edge in this many (`train.edges_every`)."""

    def apply(self, small: Recipe, world: int) -> Recipe:
        """Return the small recipe with the settings of this combination, for `world` ranks."""
        data = small.model_dump(mode="json")
        if self.model in _variants():
            data["model"]["context"]["variant"] = self.model
        data["train"]["precision"] = self.precision
        data["train"]["micro_sequences"] = small.train.sequences * self.sp // (world * self.accumulation)
        if self.slices > 1:
            data["train"] |= {
                "slice_tokens": small.train.sequence_length // self.slices,
                "edges": self.edges,
                "edges_every": min(self.edges_every, self.slices - 1),
            }
        data["parallel"]["sp"] = self.sp
        data["deepspeed"] = self.deepspeed
        data["activation_checkpointing"]["policy"] = self.checkpointing
        return parse(Recipe, data)

    def describe(self) -> dict[str, Any]:
        """Return the values by axis."""
        return {**asdict(self), "deepspeed": self.strategy}

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return Path(self.deepspeed).stem


@dataclass(frozen=True)
class Grid:
    """A small recipe, the number of ranks, and the combinations in which its step is computed."""

    small: Recipe
    world: int
    combinations: Sequence[Combination]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that give the values of an axis. The default of an axis is the recipe's own value."""
    policies = get_args(ActivationCheckpointingConfig.model_fields["policy"].annotation)
    axes = parser.add_argument_group(
        "axes", "one or more values each; default: the recipe's own; overrides come before"
    )
    axes.add_argument("--variants", nargs="+", choices=_variants(), help="context states of the Block-State layers")
    axes.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), help="precision of the step")
    axes.add_argument(
        "--zero", nargs="+", type=int, choices=range(4), metavar="{0,1,2,3}", help="ZeRO stages, as in ds_configs/"
    )
    axes.add_argument("--sp", nargs="+", type=int, metavar="N", help="sequence-parallel degrees")
    axes.add_argument("--checkpointing", nargs="+", choices=policies, metavar="POLICY", help=", ".join(policies))
    axes.add_argument("--accumulation", nargs="+", type=int, metavar="N", help="micro-batches per rank")
    axes.add_argument("--slices", nargs="+", type=int, metavar="N", help="slices per sequence (train.slice_tokens)")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="processes to start (default: the recipe's, at least 2, and as many as the degrees need)",
    )


def build(recipe: Recipe, args: argparse.Namespace) -> Grid:
    """Return the grid that the arguments describe. Raise UserError for impossible ones before anything is started."""
    from bst_dist.train import deepspeed_json  # it imports DeepSpeed, which looks for an accelerator at import

    if isinstance(recipe.data, LongRangeConfig):
        raise ConfigError(f"{recipe.name} learns the task {recipe.data.task}: only language models can be verified")
    degrees = _once(args.sp or [recipe.parallel.sp])
    world = args.ranks or max(2, default_ranks(recipe), math.lcm(*degrees))
    for sp in degrees:
        _ = Mesh(world, 0, sp)
    accumulations = _once(args.accumulation or [_accumulation(recipe)])
    slices = _once(args.slices or [min(recipe.train.slices, MOST_SLICES)])
    if min(degrees + accumulations + slices) < 1:
        raise ConfigError("--sp, --accumulation and --slices: 1 or more")
    unit = math.lcm(*degrees) * math.lcm(*slices)
    small = shrink(recipe, unit, rows=2 * world * math.lcm(*accumulations))
    strategies = [f"zero{stage}" for stage in _once(args.zero)] if args.zero else [recipe.deepspeed]
    axes = (
        _models(recipe, args.variants),
        _once(args.precision or [recipe.train.precision]),
        [str(deepspeed_file(recipe.model_copy(update={"deepspeed": name}))) for name in strategies],
        degrees,
        _once(args.checkpointing or [recipe.activation_checkpointing.policy]),
        accumulations,
        slices,
        [recipe.train.edges],
        [recipe.train.edges_every],
    )
    for path in axes[2]:
        deepspeed_json.read(Path(path))
    return Grid(small, world, [Combination(*values) for values in itertools.product(*axes)])


def require_slices(grid: Grid) -> None:
    """Raise SequenceParallelError, with the reason, if a layer cannot be computed with the sequence in slices."""
    documents = grid.small.data.documents
    for combination in {(how.model, how.sp, how.slices): how for how in grid.combinations}.values():
        if combination.sp > 1:
            recipe = combination.apply(grid.small, grid.world)
            share = recipe.train.sequence_length // (combination.slices * combination.sp)
            rehearse(
                recipe.model,
                combination.sp,
                recipe.train.micro_sequences,
                share,
                documents=documents,
                stream=combination.slices > 1,
            )


def _models(recipe: Recipe, variants: Sequence[str] | None) -> list[str]:
    if not recipe.model.mixer.startswith("bst"):
        if variants:
            raise ConfigError(f"--variants: model.mixer {recipe.model.mixer} has none; leave it out")
        return [recipe.model.mixer]
    return _once(variants or [recipe.model.context.variant])


def _accumulation(recipe: Recipe) -> int:
    """Return the recipe's micro-batches per rank, at most 2: later micro-batches are computed like the second."""
    world = default_ranks(recipe)
    dp = world // math.gcd(world, recipe.parallel.sp)
    return min(2, max(1, recipe.train.sequences // (dp * recipe.train.micro_sequences)))


def _variants() -> tuple[str, ...]:
    return get_args(ContextConfig.model_fields["variant"].annotation)


def _once(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def axes_in_common(failed: Sequence[Combination], passed: Sequence[Combination]) -> Iterator[tuple[str, Any]]:
    """Yield the (axis, value) pairs that all failures share and no pass has: the most likely cause of the failures."""
    for axis in Combination.__dataclass_fields__:
        values = {combination.describe()[axis] for combination in failed}
        if len(values) == 1 and not values & {combination.describe()[axis] for combination in passed}:
            yield axis, values.pop()
