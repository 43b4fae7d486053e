"""Sequences in slices, planned: memory and time by the size of a slice, and the longest sequence that a cluster holds.

All figures come from the same counts as the plan: one layer of each kind run on tensors without storage, in a slice
that continues from an edge, and the bytes that it leaves.
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
"""Blocks of a rank's share in the smallest slice that is tried: in less, kernels are too small to be worth it."""
SHARE = 4096
"""Tokens that a device has of the smallest slice in the search for the longest sequence."""
LONGEST = 2**34
"""Tokens at which that search ends."""


@dataclass(frozen=True)
class Size:
    """One size of slices of the recipe's sequences."""

    tokens: int
    """Of a slice; the sequence's when it is not cut."""
    slices: int
    edges_bytes: int
    """Of all edges of a micro-batch, on the rank that has them: the first of a sequence."""
    by_place: dict[str, Candidate]
    """The fastest way that fits, else the one that is least too large, with the edges in each place."""


@dataclass(frozen=True)
class Longest:
    """The longest sequence that a number of devices holds."""

    devices: int
    at_once: int
    """Tokens without slices, a power of two for each device; 0 if not even the shortest fits."""
    in_slices: dict[str, int]
    """Tokens in slices, by the place of the edges; on disk there is no limit."""
    slice_tokens: int
    """Of the slices of the longest one with edges on the device."""
    edge_bytes: int
    """Of one edge."""
    way: Candidate | None
    """How the longest one with edges on the device is computed."""


def sizes(planner: Planner) -> list[Size]:
    """Every size from the whole sequence down by powers of two, for one sequence a rank at a time."""
    length, unit, found = planner.recipe.train.sequence_length, planner.model.block, []
    for sp in planner.degrees()[:1]:
        count = 1
        while length % count == 0 and (length // count) % (unit * sp) == 0 and length // count >= FEWEST_BLOCKS * unit:
            places = PLACES if count > 1 else PLACES[:1]
            ways = {place: _best(planner, sp, count, place) for place in places}
            found.append(Size(length // count, count, (count - 1) * planner.activations.edge(1), ways))
            count *= 2
    return found


def best(found: Sequence[Size]) -> tuple[Size, str] | None:
    """The fastest size and place that fit; of equal ones (to a hundredth) the larger, with edges the nearest."""
    fitting = [(size, place) for size in found for place, way in size.by_place.items() if way.fits]
    order = {place: index for index, place in enumerate(PLACES)}
    return min(
        fitting,
        key=lambda one: (float(f"{one[0].by_place[one[1]].speed.total:.2g}"), one[0].slices, order[one[1]]),
        default=None,
    )


def where_they_help(planner: Planner, plan: Candidate) -> list[Size]:
    """All sizes where slices would make a plan fit, or its step shorter; and where it has slices itself. Else none."""
    if plan.work.slices == 1 and plan.fits and plan.work.checkpointing.policy == "none":
        return []
    found = sizes(planner)
    chosen = best(found)
    faster = chosen is not None and chosen[0].slices > 1 and (
        not plan.fits or chosen[0].by_place[chosen[1]].speed.total < plan.speed.total
    )  # fmt: skip
    return found if faster or plan.work.slices > 1 else []


def longest(recipe: Recipe, cluster: Cluster, host_bytes: float) -> Longest:
    """All devices share one sequence, under ZeRO-3 where there are several, with every layer run again.

    Args:
        host_bytes: what a node can hold of edges beside everything else.
    """
    record, tokens, way = {"device": 0, "host": 0}, 0, None
    edge = Planner(recipe, cluster).activations.edge(1)
    for slice_tokens in _powers(SHARE * cluster.world, 4):
        # Two slices: what memory takes beside the edges that wait.
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
    """The longest sequence that fits without slices, also with the layers' inputs in host memory."""
    record = 0
    for tokens in _powers(SHARE * cluster.world, 2):
        ways = (_shared(recipe, cluster, tokens, policy) for policy in ("every-layer", "offload"))
        if not any(way.fits for way in ways):
            break
        record = tokens
    return record


def _shared(recipe: Recipe, cluster: Cluster, length: int, policy: str, slices: int = 1,
            edges: str = "device") -> Candidate:  # fmt: skip
    """One sequence of that length, shared by all devices."""
    data = recipe.model_dump()
    data["train"] |= {"sequence_length": length, "sequences": 1, "micro_sequences": 1, "slice_tokens": None,
                      "edges": "device", "edges_every": 1}  # fmt: skip
    data["parallel"] = {"sp": 1}
    planner = Planner(parse(Recipe, data, f"length {length}"), cluster)
    return planner.candidate(3 if cluster.world > 1 else 0, cluster.world, 1, policy, slices, edges)


def _powers(first: int, factor: int) -> Iterator[int]:
    while first <= LONGEST:
        yield first
        first *= factor


def describe(found: Size) -> dict[str, Any]:
    """As plain data, units in the names."""
    return {
        "slice_tokens": found.tokens,
        "slices": found.slices,
        "edges_bytes": found.edges_bytes,
        "by_place": {
            place: {
                "zero_stage": way.work.strategy.stage, "deepspeed": way.work.strategy.name,
                "activation_checkpointing": way.work.checkpointing.policy,
                "needed_bytes": way.needed, "fits": way.fits, "step_s": way.speed.total,
                "rerun_s": way.speed.rerun, "host_bytes": way.memory.host, "sent_bytes": way.traffic,
            }
            for place, way in found.by_place.items()
        },
    }  # fmt: skip


def _best(planner: Planner, sp: int, slices: int, edges: str) -> Candidate:
    """The fastest way that fits with so many slices, else the one that is least too large; a row at a time."""
    stages = (*STAGES, *([GATHERED_ONCE] if slices > 1 else [])) if planner.cluster.world > 1 else STAGES[:1]
    ways = []
    for policy in ("none", "every-layer"):
        ways += [planner.candidate(stage, sp, 1, policy, slices, edges) for stage in stages]
        if fitting := [way for way in ways if way.fits]:
            return min(fitting, key=lambda way: way.speed.total)
    return min(ways, key=lambda way: way.needed)
