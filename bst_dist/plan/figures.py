"""What follows from a plan: rates, shares of links, settings; and the whole plan for machines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bst_dist.plan.search import Candidate, Planner
from bst_dist.plan.speed import Cluster

DAY_S = 86_400


def tokens_a_step(best: Candidate) -> int:
    """Over all ranks, without what is masked."""
    part = best.work.slice
    return best.spread.rows * part.length * part.sp * best.work.slices


def tokens_a_day(best: Candidate) -> float:
    """At the plan's speed."""
    return tokens_a_step(best) / best.speed.total * DAY_S


def mfu(best: Candidate, cluster: Cluster) -> float:
    """Model FLOPs utilisation: of the bf16 peak of all devices; what is run again or masked does not count."""
    counts = best.spread.rows / (best.spread.rows + best.spread.masked)
    return counts * best.speed.flops / best.speed.total / (1e12 * cluster.accelerator.bf16_tflops * cluster.world)


def by_link(best: Candidate, cluster: Cluster) -> tuple[float, float]:
    """Bytes per step inside a node and to another one, of the rank that sends most to another."""
    inside, between = cluster.split(sum(best.traffic.values()))
    shared = sum(best.between.values())
    return (inside, between + shared) if best.work.slice.sp > cluster.per_node else (inside + shared, between)


def overrides(best: Candidate) -> list[str]:
    """What makes the recipe run that way."""
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
    """The plan as plain data, units in the names."""
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
        "host_bytes": best.memory.host,
        "sent_bytes_per_step": {**best.traffic, **best.between},
        "sent_in_node_bytes_per_step": inside,
        "sent_between_nodes_bytes_per_step": between,
        "step_s": {**best.speed.parts(), "total": best.speed.total},
        "mfu": mfu(best, cluster),
        "tokens_per_day": tokens_a_day(best),
        "gpu_hours": planner.recipe.train.steps * best.speed.total * cluster.world / 3600,
        "accelerator": asdict(cluster) | {"accelerator": cluster.accelerator.model_dump()},
    }
