"""Plan training in slices: memory and time by slice size, and the longest sequence that fits on a cluster.

All figures come from the same counts as the plan: one layer of each kind runs on fake tensors, in a slice that
continues from an edge, and the bytes of the edge that it leaves are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bst_base.settings import parse
from bst_dist.config import Recipe
from bst_dist.plan.search import GATHERED_ONCE, STAGES, Candidate, Planner
from bst_dist.plan.speed import Cluster

PLACES = ("device", "host", "disk")
FEWEST_BLOCKS = 2
"""Blocks per rank in the smallest slice that is tried: in smaller ones, kernels are too small to be worth it. The whole
sequence is always tried."""
SHARE = 4096
"""Tokens per device of the smallest slice in the search for the longest sequence."""
LONGEST = 2**34
"""Largest number of tokens in that search."""


@dataclass(frozen=True)
class Size:
    """Plans for one slice size of the recipe's sequences."""

    tokens: int
    """Tokens of a slice; of the whole sequence if it is not cut."""
    slices: int
    edges_bytes: int
    """Bytes of all edges of a micro-batch, on the rank that holds them (the first rank of a sequence)."""
    by_place: dict[str, Candidate]
    """For each place of the edges, the fastest layout that fits, else the one that needs least memory."""


@dataclass(frozen=True)
class Longest:
    """The longest sequences that fit on a number of devices."""

    devices: int
    at_once: int
    """Tokens without slices, per device a power of two; 0 if not even the shortest fits."""
    in_slices: dict[str, int]
    """Tokens in slices, by the place of the edges; on disk there is no limit."""
    slice_tokens: int
    """Slice size of the longest sequence with edges on the device."""
    edge_bytes: int
    """Bytes of one edge."""
    way: Candidate | None
    """Layout of the longest sequence with edges on the device; None if no slice fits."""


def sizes(planner: Planner) -> list[Size]:
    """Return plans for every slice size, halving from the whole sequence, with micro-batches of one sequence."""
    length, found, count = planner.recipe.train.sequence_length, [], 1
    sp = planner.degrees()[0]
    unit = planner.model.block * sp
    while length % (count * unit) == 0 and (count == 1 or length // count >= FEWEST_BLOCKS * unit):
        places = PLACES if count > 1 else PLACES[:1]
        ways = {place: _best(planner, sp, count, place) for place in places}
        found.append(Size(length // count, count, (count - 1) * planner.activations.edge(1), ways))
        count *= 2
    return found


def best(found: Sequence[Size]) -> tuple[Size, str] | None:
    """Return the fastest slice size and place of edges that fit, or None.

    If times are equal to two significant digits, prefer larger slices, then the nearer place.
    """
    fitting = [(size, place) for size in found for place, way in size.by_place.items() if way.fits]
    order = {place: index for index, place in enumerate(PLACES)}
    return min(
        fitting,
        key=lambda one: (float(f"{one[0].by_place[one[1]].speed.total:.2g}"), one[0].slices, order[one[1]]),
        default=None,
    )


def where_they_help(planner: Planner, plan: Candidate) -> list[Size]:
    """Return all slice sizes if slices make the plan fit or its step shorter, or if it already uses slices; else []."""
    if plan.work.slices == 1 and plan.fits and plan.work.checkpointing.policy == "none":
        return []
    found = sizes(planner)
    chosen = best(found)
    faster = (
        chosen is not None
        and chosen[0].slices > 1
        and (not plan.fits or chosen[0].by_place[chosen[1]].speed.total < plan.speed.total)
    )
    return found if faster or plan.work.slices > 1 else []


def longest(recipe: Recipe, cluster: Cluster, host_bytes: float) -> Longest:
    """Find the longest sequence that all devices can share.

    Uses ZeRO-3 if there are several devices, and recomputes every layer.

    Args:
        host_bytes: host memory that may be used for edges.
    """
    record, tokens, way = {"device": 0, "host": 0}, 0, None
    edge = Planner(recipe, cluster).activations.edge(1)
    for slice_tokens in _powers(SHARE * cluster.world, 4):
        # Two slices with edges on disk give the memory needed besides the waiting edges.
        found = _shared(recipe, cluster, 2 * slice_tokens, "every-layer", slices=2, edges="disk")
        if not found.fits:
            break
        for place, free in (("device", -found.excess), ("host", host_bytes)):
            length = slice_tokens * (int(free // edge) + 1)
            if length > record[place]:
                record[place] = length
                tokens, way = (slice_tokens, found) if place == "device" else (tokens, way)
    return Longest(cluster.world, _at_once(recipe, cluster), record, tokens, edge, way)


def _at_once(recipe: Recipe, cluster: Cluster) -> int:
    """Return the longest sequence that fits without slices, with layers' inputs on the device or in host memory."""
    record = 0
    for tokens in _powers(SHARE * cluster.world, 2):
        ways = (_shared(recipe, cluster, tokens, policy) for policy in ("every-layer", "offload"))
        if not any(way.fits for way in ways):
            break
        record = tokens
    return record


def _shared(
    recipe: Recipe, cluster: Cluster, length: int, policy: str, slices: int = 1, edges: str = "device"
) -> Candidate:
    """Evaluate the layout in which all devices share one sequence of that length."""
    data = recipe.model_dump()
    data["train"] |= {
        "sequence_length": length,
        "sequences": 1,
        "sequence_changes": [],
        "micro_sequences": 1,
        "slice_tokens": None,
        "edges": "device",
        "edges_every": 1,
    }
    data["parallel"] = {"sp": 1}
    planner = Planner(parse(Recipe, data, f"length {length}"), cluster)
    return planner.candidate(3 if cluster.world > 1 else 0, cluster.world, 1, policy, slices, edges)


def _powers(first: int, factor: int) -> Iterator[int]:
    while first <= LONGEST:
        yield first
        first *= factor


def describe(found: Size) -> dict[str, Any]:
    """Return a size as plain data, with units in the names."""
    return {
        "slice_tokens": found.tokens,
        "slices": found.slices,
        "edges_bytes": found.edges_bytes,
        "by_place": {
            place: {
                "zero_stage": way.work.strategy.stage,
                "deepspeed": way.work.strategy.name,
                "activation_checkpointing": way.work.checkpointing.policy,
                "needed_bytes": way.needed,
                "fits": way.fits,
                "step_s": way.speed.total,
                "rerun_s": way.speed.rerun,
                "host_bytes": way.memory.host,
                "sent_bytes": way.traffic,
            }
            for place, way in found.by_place.items()
        },
    }


def _best(planner: Planner, sp: int, slices: int, edges: str) -> Candidate:
    """Return the fastest layout that fits with that many slices, else the one that needs least memory.

    Micro-batches have one row. A policy that recomputes is tried only if nothing fits without.
    """
    several = planner.cluster.world > 1
    stages = STAGES if several else STAGES[:1]
    if several and slices > 1:
        stages = (*STAGES, GATHERED_ONCE)
    ways = []
    for policy in ("none", "every-layer"):
        ways += [planner.candidate(stage, sp, 1, policy, slices, edges) for stage in stages]
        if fitting := [way for way in ways if way.fits]:
            return min(fitting, key=lambda way: way.speed.total)
    return min(ways, key=lambda way: way.needed)
