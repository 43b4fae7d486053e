"""Print a plan on the terminal: first the recommendation and its command, then the counts behind it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping

from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bst_base.terminal import Cell, Sheet, print_table
from bst_dist.config import Recipe
from bst_dist.plan.accelerators import Accelerator
from bst_dist.plan.figures import by_link, mfu, overrides, run_hours, tokens_a_day
from bst_dist.plan.flops import forward_flops
from bst_dist.plan.host import host_at_start, host_memory
from bst_dist.plan.models import entry
from bst_dist.plan.search import GATHERED_ONCE, POLICIES, STAGES, Candidate, Choice, Planner
from bst_dist.plan.slices import PLACES, Longest, Size, SliceSizes
from bst_dist.plan.slices import best as best_size
from bst_dist.plan.speed import LINK_EFFICIENCY, MEMORY_EFFICIENCY, Cluster

GB = 1e9
INDENT = (0, 0, 0, 2)


def show(
    console: Console,
    args: argparse.Namespace,
    planner: Planner,
    best: Candidate,
    reading: str = "",
    lengths: str = "",
) -> None:
    """Print one plan in full.

    `reading`: text about the passes over the data; `lengths`: text about the sequence lengths, empty if they do not
    change.
    """
    console.width = max(console.width, 100)
    cluster, device = planner.cluster, planner.cluster.accelerator
    console.print(f"[bold]{planner.recipe.name}[/] on {_cluster(cluster)}\n", highlight=False)
    verdict = {"because": _reason(planner, best)} if best.fits else {"too large": _excess(best)}
    lines = {
        "take" if best.fits else "does not fit": f"[bold]{way(best, cluster)}[/]",
        **verdict,
        "expect": _rate(planner, best),
        **({"data": reading} if reading else {}),
        **({"lengths": lengths} if lengths else {}),
        **({"batches": batches} if (batches := _batches(planner, best)) else {}),
        "assumed": f"{device.products:.0%} of peak in matrix products and {device.attention:.0%} in attention "
        f"({device.shares}), {MEMORY_EFFICIENCY:.0%} of the memory's and {LINK_EFFICIENCY:.0%} of the links' rates "
        "(docs/plan.md)",
    }
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    for name, text in lines.items():
        table.add_row(name, text)
    console.print(Padding(table, INDENT), highlight=False)
    if best.fits:
        console.print()
        console.print(command(args, best, cluster), highlight=False, soft_wrap=True)
    console.print()
    console.print(Padding(Columns(list(_counts(planner, best)), padding=(0, 5, 1, 0)), INDENT), highlight=False)
    part = best.work.slice
    title = f"  GB per GPU by ZeRO stage, with sp {part.sp} and micro-batches of {part.rows}"
    print_table(_alternatives(planner, best), f"{title}; >: the plan above; in brackets: GB too much")


def show_table(console: Console, recipe: Recipe, device: Accelerator, rows: list) -> None:
    """Print a table with the best plan of each cluster and length."""
    tokens = recipe.train.most_sequences * recipe.train.sequence_length
    console.print(
        f"[bold]{recipe.name}[/], {tokens:,} tokens per step, on nodes of {device.title}",
        highlight=False,
        soft_wrap=True,
    )
    lines = []
    bf16 = recipe.train.precision == "bf16"
    for cluster, longer, _, best in rows:
        head = (f"{longer.train.sequence_length:,}", f"{cluster.world:,}", f"{longer.train.most_sequences:,}")
        lines.append([*head, *(_cells(best, cluster, bf16) if isinstance(best, Candidate) else [*[""] * 9, best])])
    columns = (
        "tokens",
        "GPUs",
        "rows",
        "ZeRO",
        "dp",
        "sp",
        "micro",
        "checkpointing",
        "GB",
        "step s",
        "MFU",
        "G tok/day",
        "note",
    )
    print_table(Sheet(columns, lines))


def show_sizes(console: Console, planner: Planner, found: SliceSizes) -> None:
    """Print memory and time by slice size, the sizes that training refuses, and the best size."""
    length = planner.recipe.train.sequence_length
    chosen = best_size(found.planned)
    console.print(
        f"[bold]{planner.recipe.name}[/], sequences of {length:,} tokens in slices, on {_cluster(planner.cluster)}, "
        "one sequence of a rank at a time; GB per GPU by the place of edges, and the rest of the fastest that fits\n",
        highlight=False,
        soft_wrap=True,
    )
    columns = (
        "slice",
        "slices",
        "edges GB",
        *(f"GB: {place}" for place in PLACES),
        "ZeRO",
        "checkpointing",
        "GB sent",
        "step s",
        "rerun s",
    )
    print_table(Sheet(columns, [_size_row(size, chosen) for size in found.planned]))
    if found.refused:
        sizes, problem = [f"{tokens:,}" for tokens in found.refused], next(iter(found.refused.values()))
        console.print(f"not planned: slices of {', '.join(sizes)} tokens. {problem}", highlight=False, soft_wrap=True)
    if chosen is None:
        console.print("no size fits: more GPUs, or a smaller model", highlight=False)
    else:
        console.print(f"best: {' '.join(overrides(chosen[0].by_place[chosen[1]]))}", highlight=False, soft_wrap=True)


def _size_row(size: Size, chosen: tuple[Size, str] | None) -> list[Cell]:
    """Return the row of a slice size, with the figures of its fastest plan that fits."""
    fitting = [way for way in size.by_place.values() if way.fits] or [size.by_place["device"]]
    way = min(fitting, key=lambda one: one.speed.total)
    cells = [_cell(size.by_place[place], (size, place) == chosen) if place in size.by_place else "" for place in PLACES]
    return [
        f"{size.tokens:,}" if size.slices > 1 else "at once",
        f"{size.slices:,}",
        f"{size.edges_bytes / GB:,.2f}",
        *cells,
        _stage(way),
        way.work.checkpointing.describe(),
        f"{sum(way.traffic.values()) / GB:,.1f}",
        f"{way.speed.total:,.2f}",
        f"{way.speed.rerun:,.2f}",
    ]


def _stage(way: Candidate) -> str:
    strategy = way.work.strategy
    return "3, once" if strategy.name == GATHERED_ONCE else str(strategy.stage)


def show_longest(console: Console, recipe: Recipe, device: Accelerator, host_gb: float, rows: list[Longest]) -> None:
    """Print the longest sequence for each number of devices."""
    console.print(
        f"[bold]{recipe.name}[/]: the longest sequence, shared by all GPUs, on {device.title}; ZeRO-3 on several, "
        "every layer recomputed\n",
        highlight=False,
        soft_wrap=True,
    )
    lines = []
    for row in rows:
        cells = ["the model's states alone do not fit", "", "", "", ""]
        if row.refused:
            cells = [f"{row.at_once:,}", "refused", "", "", ""]
        if row.way is not None:
            disk = 1e6 / row.slice_tokens * row.edge_bytes / GB
            cells = [
                f"{row.at_once:,}",
                f"{row.slice_tokens:,}",
                f"{row.in_slices['device']:,}",
                f"{row.in_slices['host']:,}",
                f"{disk:,.1f}",
            ]
        lines.append([f"{row.devices:,}", *cells])
    columns = (
        "GPUs",
        "at once",
        "slices of",
        "edges on the device",
        f"in {host_gb:,.0f} GB of host memory",
        "on disk: GB per million tokens",
    )
    print_table(Sheet(columns, lines, flush_right=True))
    for problem in dict.fromkeys(row.refused for row in rows if row.refused):
        console.print(f"refused: {problem}", highlight=False, soft_wrap=True)


def way(best: Candidate, cluster: Cluster) -> str:
    """Return the plan's choices in one line."""
    work = best.work
    micro_batches = work.accumulation // work.slices
    times = f"{micro_batches} micro-batches" if micro_batches > 1 else "one micro-batch"
    rows = f"{work.slice.rows} sequence" + ("s" if work.slice.rows > 1 else "")
    return (
        f"ZeRO-{work.strategy.stage}, dp {cluster.world // work.slice.sp} x sp {work.slice.sp}, {times} of {rows}, "
        f"activation checkpointing: {work.checkpointing.describe()}"
        + (f", {work.slices} slices of a sequence, edges: {work.edges}" if work.slices > 1 else "")
        + (f", one in {work.edges_every}" if work.edges_every > 1 else "")
    )


def command(args: argparse.Namespace, best: Candidate, cluster: Cluster) -> str:
    """Return the command line that trains as planned."""
    settings = shlex.join([args.recipe, *args.overrides, *overrides(best)])
    if cluster.nodes == 1:
        return f"bst train {settings} --ranks {cluster.world}"
    return f"bst launch {settings} --hostfile HOSTS"


def _cluster(cluster: Cluster) -> str:
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    return f"{nodes} of {cluster.per_node} x {cluster.accelerator.title}: {cluster.world:,} GPUs"


def _reason(planner: Planner, best: Candidate) -> str:
    work = best.work
    why = []
    if work.checkpointing.policy == "none":
        why.append("all activations fit, so nothing is recomputed")
    else:
        why.append(f"the shortest step of what fits: keeping all activations takes {_everything(planner, best)}")
    if work.slice.sp > planner.degrees()[0]:
        kept = work.checkpointing.describe()
        how = "without activation checkpointing" if kept == "none" else f"with activation checkpointing {kept}"
        why.append(f"{how}, fewer than {work.slice.sp} ranks per sequence do not have enough memory")
    elif work.slice.sp > 1:
        train, world = planner.recipe.train, planner.cluster.world
        sequences = train.fewest_sequences if train.fewest_sequences < world else train.most_sequences
        why.append(f"{sequences} sequences for {world} ranks, so {work.slice.sp} share one")
    if work.strategy.stage == 3:
        why.append("the fastest layout that fits is ZeRO-3, which shards parameters too")
    elif work.strategy.overlap_comm:
        why.append(f"ZeRO-{work.strategy.stage} reduces gradients during the backward pass")
    if imbalance := best.spread.imbalance_message(work.slice.sp):
        why.append(imbalance)
    return "; ".join(why)


def _everything(planner: Planner, best: Candidate) -> str:
    """Return the memory needed without activation checkpointing, as text."""
    part = best.work.slice
    kept = planner.candidate(Choice(best.work.strategy.stage, part.sp, 1, "none"))
    return f"{kept.needed / GB:,.0f} of {best.limit / GB:.0f} GB, even one sequence at a time"


def _excess(best: Candidate) -> str:
    """Return text that says by how much the plan does not fit, and what would help."""
    memory = best.memory
    excess = f"by {best.excess / GB:,.1f} GB ({best.needed / GB:,.1f} of {best.limit / GB:.0f})"
    states = memory.weights + memory.optimizer + memory.gradients
    if states > best.limit / 2:
        return f"{excess}; the model's states alone take {states / GB:,.1f} GB per GPU: more GPUs, or a smaller model"
    activations = (memory.activations + memory.loss) / GB
    return (
        f"{excess}; activations take {activations:,.1f} GB per GPU: more GPUs to share a sequence, or shorter sequences"
    )


def _rate(planner: Planner, best: Candidate) -> str:
    cluster, steps = planner.cluster, planner.recipe.train.steps
    hours = run_hours(planner, best)
    used = mfu(best, cluster, planner.bf16)
    return (
        f"{best.speed.total:,.3g} s per step, MFU {used:.0%}, {tokens_a_day(best) / 1e9:,.1f} G tokens per day; "
        f"{steps:,} steps in {hours:,.1f} h, {hours * cluster.world:,.0f} GPU-hours"
    )


def _batches(planner: Planner, best: Candidate) -> str:
    """Return text that lists the batches of a run, empty if there is only one."""
    phases = planner.phases(best)
    if len(phases) == 1:
        return ""
    listed = ", ".join(
        f"{phase.sequences:,} sequences from step {phase.from_step:,} ({phase.step_s:,.3g} s per step)"
        for phase in phases
    )
    return (
        f"{listed}; the hours are the sum of all steps, everything else is for the largest batch of "
        f"{planner.recipe.train.most_sequences:,}"
    )


def _counts(planner: Planner, best: Candidate) -> list[Table]:
    """Return the plan's counts, one small table for each kind."""
    recipe = planner.recipe
    parameters = entry(recipe.name, recipe.model, 2 * recipe.model.block).parameters
    flops = forward_flops(recipe.model, recipe.train.sequence_length)
    lost = {"fragmentation, libs": best.needed - best.memory.total}
    sent = {**best.traffic, **best.between}
    inside, between = by_link(best, planner.cluster)
    found = [
        _count("parameters, M", parameters, 1e6, 1),
        _count("GFLOP per token, both passes", {term: 3 * count for term, count in flops.items()}, 1e9, 3),
        _count(f"GB per GPU, in the {best.memory.phase}", best.memory.classes() | lost, GB, 2),
        _count("seconds per step", best.speed.parts(), 1.0, 3),
    ]
    if sent:
        links = {"inside the node": inside, "to another node": between}
        found += [_count("GB sent per step and GPU", sent, GB, 3), _count("of that, over links", links, GB, 3)]
    if any((host := host_memory(planner, best)).values()):
        found.append(_count("host GB per GPU", host, GB, 2))
    return [*found, _count("host GB per GPU, at the start", {"whole model": host_at_start(planner)}, GB, 2)]


def _count(title: str, amounts: Mapping[str, float], unit: float, digits: int) -> Table:
    """Return a table of the amounts that do not round to zero, largest first, and the sum of all."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.title, table.title_justify, table.title_style = title, "left", "dim"
    shown = [item for item in sorted(amounts.items(), key=lambda item: -item[1]) if item[1] / unit >= 0.5 * 10**-digits]
    for name, amount in shown:
        table.add_row(name, f"{amount / unit:,.{digits}f}")
    if len(shown) > 1:
        table.add_row("[bold]total[/]", f"[bold]{sum(amounts.values()) / unit:,.{digits}f}[/]")
    return table


def _alternatives(planner: Planner, best: Candidate) -> Sheet:
    """Return a table of the memory of every ZeRO stage and checkpointing policy, all else as in the plan."""
    part, rows = best.work.slice, []
    for policy in POLICIES:
        ways = [planner.candidate(Choice(stage, part.sp, part.rows, policy)) for stage in STAGES]
        fitting = [each for each in ways[:3] if each.fits] or [each for each in ways[3:] if each.fits]
        fastest = min((each.speed.total for each in fitting), default=None)
        cells = [_cell(each, chosen=best.fits and each.work == best.work) for each in ways]
        rows.append([ways[0].work.checkpointing.describe(), *cells, "" if fastest is None else f"{fastest:,.3f}"])
    return Sheet(("checkpointing", *(f"ZeRO-{stage}" for stage in STAGES), "step s"), rows)


def _cell(way: Candidate, chosen: bool) -> Cell:
    needed = f"{way.needed / GB:,.1f}"
    if not way.fits:
        return Text.assemble(needed, (f" (+{way.excess / GB:,.1f})", "red"))
    return Text(f"> {needed}", style="bold green") if chosen else needed


def _cells(best: Candidate, cluster: Cluster, bf16: bool) -> list[str]:
    work, sp = best.work, best.work.slice.sp
    rates = [f"{best.speed.total:,.2f}", f"{mfu(best, cluster, bf16):.0%}", f"{tokens_a_day(best) / 1e9:,.1f}"]
    if not best.fits:
        rates = ["", "", ""]
    return [
        str(work.strategy.stage),
        str(cluster.world // sp),
        str(sp),
        str(work.slice.rows),
        work.checkpointing.describe(),
        f"{best.needed / GB:,.1f}",
        *rates,
        "" if best.fits else f"{best.excess / GB:,.1f} GB over",
    ]
