"""Plan a recipe on a cluster: what fits, the best layout, time per step, and traffic per link.

    bst plan launch/recipes/paper/small-bst-sh.yaml --nodes 1 --gpus-per-node 8 --gpu h100-80gb
    bst plan launch/recipes/bst-7b.yaml --nodes 1,8,64 --lengths 4096,65536,1048576
    bst plan launch/recipes/bst-1.3b.yaml train.sequence_length=1048576 train.sequences=1 --slices
    bst plan launch/recipes/bst-1.3b.yaml --longest 1,8,64
    bst plan my-recipe.yaml --nodes 1,8 --from-run runs/first

Nothing is launched and no weights are allocated: layers run on tensors without storage. Several numbers of nodes, or
--lengths, give a table with the best plan for each; the tokens per step stay the same, so longer sequences mean fewer
of them. Times come from a model fitted to one H200 (see docs/plan.md).

Ctrl-C ends a table and prints the finished lines.

`--from-run RUN` calibrates all times: they are multiplied by a run's measured time over its planned time, on such
devices. `--accelerators FILE` adds devices of your own, in the form of bst_dist/plan/accelerators.yaml.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from bst_base.stopping import INTERRUPTED, deferred_interrupt
from bst_dist.config import Recipe, load_recipe, with_vocabulary
from bst_dist.plan import slices
from bst_dist.plan.accelerators import Accelerator, accelerator, accelerators
from bst_dist.plan.figures import describe
from bst_dist.plan.measured import measure
from bst_dist.plan.report import show, show_longest, show_sizes, show_table
from bst_dist.plan.search import Candidate, PlanError, Planner
from bst_dist.plan.speed import Cluster
from data_pipeline.commands.progress import stages
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.passes import passes_message
from data_pipeline.serve.share import Share

T = TypeVar("T")
R = TypeVar("R")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe, YAML, or the name of one of launch/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")
    parser.add_argument(
        "--nodes",
        type=_numbers,
        default=[1],
        metavar="N,...",
        help="number of nodes; several numbers give a table (default: 1)",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="accelerators per node (default: 8)")
    parser.add_argument(
        "--gpu",
        default="h100-80gb",
        metavar="NAME",
        help=f"accelerator: {', '.join(accelerators())}, or a name of --accelerators (default: h100-80gb)",
    )
    parser.add_argument("--lengths", type=_numbers, metavar="L,...", help="sequence lengths in tokens; gives a table")
    parser.add_argument(
        "--slices",
        action="store_true",
        help="table of memory and time by train.slice_tokens, and the fastest that fits",
    )
    parser.add_argument(
        "--longest",
        type=_numbers,
        metavar="GPUS,...",
        help="the longest sequence that fits on this many GPUs, whole and in slices",
    )
    parser.add_argument(
        "--host-gb",
        type=float,
        default=1000,
        metavar="GB",
        help="with --longest: host memory per node that edges may use (default: 1000)",
    )
    parser.add_argument(
        "--from-run", type=Path, metavar="RUN", help="multiply all times by this run's measured time / planned time"
    )
    parser.add_argument("--accelerators", type=Path, metavar="FILE", help="YAML file with your own accelerators")


def _numbers(text: str) -> list[int]:
    """Parse positive whole numbers separated by commas."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected positive numbers")
    return numbers


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the plan, or the table of plans. `passed` is False if a single plan does not fit."""
    whole = load_recipe(args.recipe, args.overrides)
    if whole.model.vocab_size is None:
        whole = with_vocabulary(whole, open_corpora(whole.data))
    recipe = whole.of_one_length(whole.train.longest)  # the longest needs the most memory and time per token
    device = accelerator(args.gpu, args.accelerators)
    if args.gpus_per_node < 1:
        raise PlanError(f"--gpus-per-node {args.gpus_per_node}: at least 1")
    if args.longest and args.from_run:
        raise PlanError("--longest plans only memory and --from-run only time: leave one of them out")
    if args.longest:
        return _longest(args, recipe, device)
    measured = measure(args.from_run, device) if args.from_run else None
    slower = measured.slower if measured else 1.0
    clusters = [Cluster(nodes, args.gpus_per_node, device, slower) for nodes in args.nodes]
    if measured:
        Console().print(f"{measured}\n", highlight=False, soft_wrap=True)
    if args.slices and (len(clusters) > 1 or args.lengths):
        raise PlanError("--slices needs one value of --nodes and no --lengths")
    if len(clusters) == 1 and not args.lengths:
        planner = Planner(recipe, clusters[0])
        if args.slices:
            found = slices.sizes(planner, whole)
            show_sizes(Console(), planner, found)
            return {"recipe": recipe.name, **slices.describe(found)}
        best = planner.best()
        reading = _reading(whole)
        show(Console(), args, planner, best, reading, _lengths(whole))
        if found := slices.where_they_help(planner, best, whole):
            show_sizes(Console(), planner, found)
        report = {"passed": best.fits, "fits": best.fits, "recipe": recipe.name, **describe(planner, best)}
        return report | (slices.describe(found) if found else {})
    rows, ended = _table(recipe, clusters, args.lengths or [recipe.train.sequence_length])
    show_table(Console(), recipe, device, rows)
    return {"recipe": recipe.name, "plans": [_entry(*row) for row in rows], **ended}


def _lengths(recipe: Recipe) -> str:
    """Return text that lists the sequence lengths of a run, empty if there is only one length."""
    if not recipe.train.length_changes:
        return ""
    changes = ", ".join(f"{length:,} from step {step:,}" for step, length in recipe.train.lengths.changes[1:])
    return f"{recipe.train.sequence_length:,} tokens, {changes}; planned as if all were {recipe.train.longest:,}"


def _reading(recipe: Recipe) -> str:
    """Return text with the number of passes over each corpus. Raise UserError for more than data.max_passes."""
    if not isinstance(recipe.data, DataConfig):
        return ""
    once = recipe.data.storage.model_copy(update={"attempts": 1})  # this machine may not reach the store
    train = recipe.train
    share = Share(length=train.sequence_length, rows=train.sequences, micro_rows=1)
    sizes = {"block": recipe.model.block, "seed": recipe.seed}
    sizes |= {"changes": train.batches.changes[1:], "lengths": train.lengths.changes[1:]}
    try:
        corpora = open_corpora(recipe.data.model_copy(update={"storage": once}))
        loader = Loader(recipe.data, corpora, share, **sizes)
    except UserError as error:
        return f"passes not counted: {error}"
    return passes_message(loader, train.steps)


def _longest(args: argparse.Namespace, recipe: Recipe, device: Accelerator) -> dict[str, Any]:
    def longest(count: int) -> slices.Longest:
        nodes = -(-count // args.gpus_per_node)
        if count % nodes:
            raise PlanError(f"--longest {count}: not a whole number of GPUs on {nodes} nodes of {args.gpus_per_node}")
        return slices.longest(recipe, Cluster(nodes, count // nodes, device), 1e9 * args.host_gb)

    found, ended = _until_told(args.longest, longest)
    show_longest(Console(width=120), recipe, device, args.host_gb, found)
    keys = ("devices", "at_once", "in_slices", "slice_tokens", "edge_bytes", "refused")
    return {"recipe": recipe.name, "longest": [{key: getattr(row, key) for key in keys} for row in found], **ended}


def _until_told(items: Sequence[T], made: Callable[[T], R]) -> tuple[list[R], dict[str, Any]]:
    """Apply `made` to each item and show the progress, until Ctrl-C.

    Return the results so far, and entries for the report: empty, or those of a stopped command.
    """
    found: list[R] = []
    with deferred_interrupt() as stop_requested, stages(Console(stderr=True)) as report:
        for item in items:
            found.append(made(item))
            report("plan", len(found), len(items))
            if stop_requested() and len(found) < len(items):
                print(f"stopped: {len(found)} of {len(items)} are planned", file=sys.stderr)
                return found, {"passed": False, "exit_status": INTERRUPTED}
    return found, {}


Row = tuple[Cluster, Recipe, Planner | None, Candidate | str]


def _table(recipe: Recipe, clusters: list[Cluster], lengths: list[int]) -> tuple[list[Row], dict[str, Any]]:
    """Return the best plan for each cluster and length, or the error message if there is none."""

    def row(of: tuple[Recipe, Cluster]) -> Row:
        longer, cluster = of
        planner = Planner(longer, cluster)
        try:
            return cluster, longer, planner, planner.best()
        except UserError as error:
            return cluster, longer, None, str(error)

    longer = [_of_length(recipe, length) for length in lengths]
    return _until_told([(one, cluster) for one in longer for cluster in clusters], row)


def _of_length(recipe: Recipe, length: int) -> Recipe:
    """Return the recipe with sequences of that length and the same tokens per step, but at least one sequence.

    Raise ConfigError if the length is not a multiple of the block.
    """

    def of(sequences: int) -> int:
        return max(1, round(sequences * recipe.train.sequence_length / length))

    data = recipe.model_dump()
    changes = [{"step": one.step, "sequences": of(one.sequences)} for one in recipe.train.sequence_changes]
    data["train"] |= {
        "sequence_length": length,
        "sequences": of(recipe.train.sequences),
        "micro_sequences": 1,
        "sequence_changes": changes,
    }
    data["parallel"] = {"sp": 1}
    if length % recipe.model.block:
        near = max(1, round(length / recipe.model.block)) * recipe.model.block
        raise ConfigError(f"--lengths {length}: not a multiple of model.block {recipe.model.block}: nearest is {near}")
    return parse(Recipe, data, f"length {length}")


def _entry(cluster: Cluster, recipe: Recipe, planner: Planner | None, best: Candidate | str) -> dict[str, Any]:
    key = {"nodes": cluster.nodes, "gpus": cluster.world, "sequence_length_tokens": recipe.train.sequence_length}
    return key | ({"impossible": best} if isinstance(best, str) else describe(planner, best))
