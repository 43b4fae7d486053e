"""Figures derived from a plan: tokens per day, MFU, bytes per link, overrides; and the plan as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bst_dist.plan.host import host_at_start, host_memory
from bst_dist.plan.search import Candidate, Planner
from bst_dist.plan.speed import Cluster

DAY_S = 86_400


def tokens_a_step(best: Candidate) -> int:
    """Return the tokens of one step with the largest batch, over all ranks, without masked ones."""
    part = best.work.slice
    return best.spread.rows * part.length * part.sp * best.work.slices


def tokens_a_day(best: Candidate) -> float:
    """Return the tokens per day at the planned speed."""
    return tokens_a_step(best) / best.speed.total * DAY_S


def run_hours(planner: Planner, best: Candidate) -> float:
    """Return the hours of all steps of the run, each with its own batch."""
    return sum(phase.steps * phase.step_s for phase in planner.phases(best)) / 3600


def mfu(best: Candidate, cluster: Cluster, bf16: bool) -> float:
    """Return the model FLOPs utilisation: model FLOP/s divided by the peak of all devices.

    `bf16`: whether the run trains in bf16; else the peak is that of fp32, as in the reports of the run. Recomputation
    and masked sequences do not count.
    """
    counts = best.spread.rows / (best.spread.rows + best.spread.masked)
    return counts * best.speed.flops / best.speed.total / (cluster.accelerator.peak_flops(bf16) * cluster.world)


def by_link(best: Candidate, cluster: Cluster) -> tuple[float, float]:
    """Return the bytes that a rank sends per step inside its node and to another node.

    It is the rank that sends most to another node.
    """
    inside, between = cluster.split(sum(best.traffic.values()))
    shared = sum(best.between.values())
    return (inside, between + shared) if best.work.slice.sp > cluster.per_node else (inside + shared, between)


def overrides(best: Candidate) -> list[str]:
    """Return the overrides, as `section.field=value`, that make the recipe run as planned."""
    work = best.work
    slices = [
        f"train.slice_tokens={work.slice.length * work.slice.sp}",
        f"train.edges={work.edges}",
        *([f"train.edges_every={work.edges_every}"] if work.edges_every > 1 else []),
    ]
    return [
        f"deepspeed={work.strategy.name}",
        f"parallel.sp={work.slice.sp}",
        f"train.micro_sequences={work.slice.rows}",
        f"activation_checkpointing.policy={work.checkpointing.policy}",
        *(slices if work.slices > 1 else []),
    ]


def describe(planner: Planner, best: Candidate) -> dict[str, Any]:
    """Return the plan as plain data, with units in the names."""
    work, cluster = best.work, planner.cluster
    inside, between = by_link(best, cluster)
    return {
        "fits": best.fits,
        "zero_stage": work.strategy.stage,
        "dp": cluster.world // work.slice.sp,
        "sp": work.slice.sp,
        "micro_sequences": work.slice.rows,
        "micro_batches": work.accumulation // work.slices,
        "masked_sequences": best.spread.masked,
        "slices": work.slices,
        "edges": work.edges,
        "edges_every": work.edges_every,
        "activation_checkpointing": work.checkpointing.policy,
        "overrides": overrides(best),
        "memory_bytes": best.memory.classes(),
        "memory_peak": best.memory.phase,
        "needed_bytes": best.needed,
        "device_bytes": best.limit,
        "excess_bytes": best.excess,
        "host_bytes": {name.replace(" ", "_"): held for name, held in host_memory(planner, best).items()},
        "host_start_bytes": host_at_start(planner),
        "sent_bytes_per_step": {**best.traffic, **best.between},
        "sent_in_node_bytes_per_step": inside,
        "sent_between_nodes_bytes_per_step": between,
        "step_s": {**best.speed.parts(), "total": best.speed.total},
        "mfu": mfu(best, cluster, planner.bf16),
        "tokens_per_day": tokens_a_day(best),
        "batches": [asdict(phase) for phase in planner.phases(best)],
        "gpu_hours": run_hours(planner, best) * cluster.world,
        "accelerator": asdict(cluster) | {"accelerator": cluster.accelerator.model_dump()},
    }
