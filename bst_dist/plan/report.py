"""A plan for people: the recommendation first, with the command that takes it, then what it rests on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from bst_dist.config import Recipe
from bst_dist.plan.accelerators import Accelerator
from bst_dist.plan.flops import forward_flops
from bst_dist.plan.models import entry
from bst_dist.plan.search import POLICIES, STAGES, Candidate, Planner
from bst_dist.plan.speed import LINK_EFFICIENCY, MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, Cluster

DAY_S, GB = 86_400, 1e9


def show(console: Console, args: argparse.Namespace, planner: Planner, best: Candidate) -> None:
    """One plan, in full."""
    console.width = max(console.width, 110)
    cluster, recipe = planner.cluster, planner.recipe
    console.print(f"[bold]{recipe.name}[/] on {_cluster(cluster)}", highlight=False)
    lines = {
        ("take" if best.fits else "does not fit"): f"[bold]{way(best, cluster)}[/]",
        "run": command(args, best, cluster),
        **({"because": _reason(planner, best)} if best.fits else {"too large by": _excess(planner, best)}),
        "parameters": _parameters(planner),
        "FLOPs a token": _flops(recipe),
        "memory": _memory(best),
        **_sent(best, cluster),
        "a step": _step(best),
        "at that rate": _rate(planner, best),
        "assumed": f"{MATMUL_EFFICIENCY:.0%} of peak in matrix products, {MEMORY_EFFICIENCY:.0%} of the memory's and "
        f"{LINK_EFFICIENCY:.0%} of the links' rates; measured on no GPU (docs/plan.md)",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, text)
    console.print(Padding(table, (1, 0, 0, 2)), highlight=False)
    part = best.work.slice
    title = f"GB a GPU by ZeRO stage, with sp {part.sp} and micro-batches of {part.rows}"
    console.print(f"\n  {title}; in brackets, by how much it does not fit", highlight=False)
    console.print(_alternatives(planner, best), highlight=False)


def show_table(console: Console, recipe: Recipe, device: Accelerator, rows: list) -> None:
    """The best plan of each cluster and length, a row each."""
    console.width = max(console.width, 130)
    tokens = recipe.train.sequences * recipe.train.sequence_length
    table = Table(
        title=f"{recipe.name}: best plans on nodes of {device.title}, {tokens:,} tokens a step",
        title_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    left = ("checkpointing", "note")
    for column in ("tokens", "GPUs", "sequences", "ZeRO", "dp", "sp", "micro", "checkpointing", "GB a GPU", "step s",
                   "MFU", "G tokens/day", "note"):  # fmt: skip
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column != "note")
    for cluster, longer, _, best in rows:
        head = (f"{longer.train.sequence_length:,}", f"{cluster.world:,}", f"{longer.train.sequences:,}")
        table.add_row(*head, *(_cells(best, cluster) if isinstance(best, Candidate) else [""] * 9 + [_brief(best)]))
    console.print(table, highlight=False)


def _cells(best: Candidate, cluster: Cluster) -> list[str]:
    work, sp = best.work, best.work.slice.sp
    limit = f"of {best.limit / GB:.0f}: {(best.needed - best.limit) / GB:,.1f} GB too much"
    cells = [str(work.strategy.stage), str(cluster.world // sp), str(sp), str(work.slice.rows)]
    cells += [work.checkpointing.describe(), f"{best.needed / GB:,.1f}"]
    rates = [f"{best.speed.total:,.2f}", f"{_mfu(best, cluster):.0%}", f"{_tokens_a_day(best, cluster) / 1e9:,.1f}"]
    return [*cells, *rates, "" if best.fits else limit]


def _brief(reason: str) -> str:
    return reason.partition(": ")[0] if len(reason) > 200 else reason


def describe(planner: Planner, best: Candidate) -> dict[str, Any]:
    """The plan for machines."""
    work, cluster = best.work, planner.cluster
    inside, between = _by_link(best, cluster)
    return {
        "fits": best.fits,
        "zero_stage": work.strategy.stage,
        "dp": cluster.world // work.slice.sp,
        "sp": work.slice.sp,
        "micro_sequences": work.slice.rows,
        "micro_batches": work.accumulation,
        "activation_checkpointing": work.checkpointing.policy,
        "overrides": overrides(best),
        "memory_bytes": best.memory.classes(),
        "memory_peak": best.memory.phase,
        "needed_bytes": best.needed,
        "device_bytes": best.limit,
        "host_bytes": best.memory.host,
        "sent_bytes_per_step": {**best.traffic, **best.between},
        "sent_in_node_bytes_per_step": inside,
        "sent_between_nodes_bytes_per_step": between,
        "step_s": {**asdict(best.speed), "total": best.speed.total},
        "mfu": _mfu(best, cluster),
        "tokens_per_day": _tokens_a_day(best, cluster),
        "gpu_hours": planner.recipe.train.steps * best.speed.total * cluster.world / 3600,
    }


def way(best: Candidate, cluster: Cluster) -> str:
    """The choices in one line."""
    work = best.work
    times = f"{work.accumulation} micro-batches" if work.accumulation > 1 else "one micro-batch"
    rows = f"{work.slice.rows} sequence" + ("s" if work.slice.rows > 1 else "")
    return (
        f"ZeRO-{work.strategy.stage}, dp {cluster.world // work.slice.sp} x sp {work.slice.sp}, {times} of {rows}, "
        f"activation checkpointing: {work.checkpointing.describe()}"
    )


def overrides(best: Candidate) -> list[str]:
    """What makes the recipe run that way."""
    work = best.work
    return [
        f"deepspeed={work.strategy.name}",
        f"parallel.sp={work.slice.sp}",
        f"train.micro_sequences={work.slice.rows}",
        f"activation_checkpointing.policy={work.checkpointing.policy}",
    ]


def command(args: argparse.Namespace, best: Candidate, cluster: Cluster) -> str:
    """The command line, to be pasted."""
    settings = " ".join([args.recipe, *args.overrides, *overrides(best)])
    if cluster.nodes == 1:
        return f"bst train {settings} --ranks {cluster.world}"
    return f"deepspeed --hostfile HOSTS --module bst_dist.train {settings}"


def _cluster(cluster: Cluster) -> str:
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    return f"{nodes} of {cluster.per_node} {cluster.accelerator.title} = {cluster.world:,} GPUs"


def _reason(planner: Planner, best: Candidate) -> str:
    work = best.work
    why = []
    if work.checkpointing.policy == "none":
        why.append("all activations fit, so nothing is computed twice")
    else:
        why.append(f"the shortest step of what fits: keeping more takes {_over(planner, best)}")
    if work.slice.sp > planner.degrees()[0]:
        why.append(f"a sequence needs {work.slice.sp} ranks for its activations")
    elif work.slice.sp > 1:
        why.append(
            f"{planner.recipe.train.sequences} sequences for {planner.cluster.world} ranks: {work.slice.sp} share one"
        )
    if work.strategy.stage == 3:
        why.append("weights and optimizer states fit only when spread over all ranks")
    elif work.strategy.overlap_comm:
        why.append(f"ZeRO-{work.strategy.stage} reduces gradients behind the backward pass")
    return "; ".join(why)


def _over(planner: Planner, best: Candidate) -> str:
    """What the policy that keeps everything would need beyond the device."""
    part = best.work.slice
    everything = planner.candidate(best.work.strategy.stage, part.sp, 1, "none")
    return f"{everything.needed / GB:,.0f} of {best.limit / GB:.0f} GB even for one sequence at a time"


def _excess(planner: Planner, best: Candidate) -> str:
    """By how much, and what would help."""
    memory = best.memory
    excess = f"{(best.needed - best.limit) / GB:,.1f} GB ({best.needed / GB:,.1f} of {best.limit / GB:.0f})"
    states = memory.weights + memory.optimizer + memory.gradients
    if states > best.limit / 2:
        return f"{excess}; states alone take {states / GB:,.1f} GB a rank: more GPUs, or a smaller model"
    advice = "shorter sequences, or more GPUs to share one"
    return f"{excess}; activations take {memory.activations / GB:,.1f} GB: {advice}"


def _parameters(planner: Planner) -> str:
    recipe = planner.recipe
    counts = entry(recipe.name, recipe.model, recipe.model.block * 2).parameters
    return f"{sum(counts.values()) / 1e6:,.1f} M: " + _shares(counts, 1e6, "M", 1)


def _flops(recipe: Recipe) -> str:
    terms = {term: 3 * flops for term, flops in forward_flops(recipe.model, recipe.train.sequence_length).items()}
    total = sum(terms.values())
    return f"{total / 1e9:,.2f} G forward and backward: " + _shares(terms, 1e9, "G", 2)


def _memory(best: Candidate) -> str:
    free = best.limit - best.needed
    classes = _shares(best.memory.classes(), GB, "GB", 2)
    host = f"; {best.memory.host / GB:,.1f} GB in the host's memory" if best.memory.host else ""
    return (
        f"{best.needed / GB:,.1f} of {best.limit / GB:.0f} GB, {abs(free) / GB:,.1f} "
        f"{'free' if free >= 0 else 'too much'}; peak in the {best.memory.phase}: {classes}; "
        f"the allocator's holes and libraries {(best.needed - best.memory.total) / GB:,.1f} GB{host}"
    )


def _sent(best: Candidate, cluster: Cluster) -> dict[str, str]:
    """By kind, and by link."""
    found = {}
    kinds = {**best.traffic, **best.between}
    if kinds:
        inside, between = _by_link(best, cluster)
        found["sent a step"] = f"a GPU {sum(kinds.values()) / GB:,.2f} GB: " + _shares(kinds, GB, "GB", 3)
        found["over links"] = f"inside a node {inside / GB:,.2f} GB, to another node {between / GB:,.2f} GB a GPU"
    return found


def _by_link(best: Candidate, cluster: Cluster) -> tuple[float, float]:
    """Bytes inside a node and to another one, of the rank that sends most to another."""
    inside, between = cluster.split(sum(best.traffic.values()))
    shared = sum(best.between.values())
    return (inside, between + shared) if best.work.slice.sp > cluster.per_node else (inside + shared, between)


def _step(best: Candidate) -> str:
    parts = {name: value for name, value in asdict(best.speed).items() if name != "flops"}
    return f"{best.speed.total:,.3f} s: " + _shares(parts, 1.0, "s", 3)


def _rate(planner: Planner, best: Candidate) -> str:
    cluster, steps = planner.cluster, planner.recipe.train.steps
    hours = steps * best.speed.total / 3600
    return (
        f"MFU {_mfu(best, cluster):.0%}, {_tokens_a_day(best, cluster) / 1e9:,.1f} G tokens a day; {steps:,} steps "
        f"take {hours:,.1f} h, {hours * cluster.world:,.0f} GPU-hours"
    )


def _mfu(best: Candidate, cluster: Cluster) -> float:
    peak = 1e12 * cluster.accelerator.bf16_tflops * cluster.world
    return best.speed.flops / best.speed.total / peak


def _tokens_a_day(best: Candidate, cluster: Cluster) -> float:
    part = best.work.slice
    tokens = part.rows * part.length * best.work.accumulation * cluster.world
    return tokens / best.speed.total * DAY_S


def _shares(amounts: Mapping[str, float], unit: float, sign: str, digits: int) -> str:
    """The amounts that show, largest first."""
    shown = sorted(amounts.items(), key=lambda item: -item[1])
    least = 0.5 * 10**-digits
    return ", ".join(f"{name} {amount / unit:,.{digits}f} {sign}" for name, amount in shown if amount / unit >= least)


def _alternatives(planner: Planner, best: Candidate) -> Table:
    """Memory of every stage and policy, all else as in the plan."""
    part = best.work.slice
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("checkpointing")
    for stage in STAGES:
        table.add_column(f"ZeRO-{stage}", justify="right")
    table.add_column("step s", justify="right")
    for policy in POLICIES:
        ways = [planner.candidate(stage, part.sp, part.rows, policy) for stage in STAGES]
        fitting = [each for each in ways[:3] if each.fits] or [each for each in ways[3:] if each.fits]
        fastest = min((each.speed.total for each in fitting), default=None)
        cells = [_cell(each, chosen=each.work == best.work) for each in ways]
        table.add_row(ways[0].work.checkpointing.describe(), *cells, "" if fastest is None else f"{fastest:,.3f}")
    return table


def _cell(way: Candidate, chosen: bool) -> str:
    over = way.needed - way.limit
    if over > 0:
        return f"{way.needed / GB:,.1f} [red](+{over / GB:,.1f})[/]"
    text = f"{way.needed / GB:,.1f}"
    return f"[bold green]> {text}[/]" if chosen else text
