"""What one rank sends in a step, by kind.

A ring is assumed for the collectives of all ranks, as backends do it for large messages: an all-reduce passes every
byte on twice, a gather and a reduce-scatter once. `sent` says so for a call, planned or observed, so both are counted
alike.
"""

from __future__ import annotations

from collections import Counter

from bst_dist.model.config import ModelConfig
from bst_dist.plan.memory.gathering import gather
from bst_dist.plan.memory.peak import Work
from bst_dist.plan.memory.zero import ALIGNMENT, WORD, Sizes, muon_share

REDUCE, GATHER, SCATTER = "gradients: all-reduce", "weights: all-gather", "gradients: reduce-scatter"
MOMENTUM = "momentum: all-to-all"


def sent(kind: str, whole: float, ranks: int) -> float:
    """Bytes that one of `ranks` sends in a collective over `whole` bytes: all that is reduced, or gathered."""
    rounds = {REDUCE: 2, GATHER: 1, SCATTER: 1}[kind]
    return rounds * whole * (ranks - 1) / ranks


def zero_traffic(sizes: Sizes, work: Work) -> dict[str, float]:
    """Of one step, for gradients, weights and Muon's momentum; norms and flags, a few bytes per step, are left out."""
    if work.world == 1:
        return {}
    found = _gradients_and_weights(sizes, work)
    if sizes.muon and work.strategy.stage:
        found[MOMENTUM] = muon_share(sizes, work.strategy.stage, work.world).sent
    return found


def _gradients_and_weights(sizes: Sizes, work: Work) -> dict[str, float]:
    stage, world, micro_batches = work.strategy.stage, work.world, work.accumulation
    if stage < 3:
        times = micro_batches if stage == 2 else 1
        found = {REDUCE: sent(REDUCE, times * WORD * sizes.total, world)}
        flat = sum(-(-sum(group) // (ALIGNMENT * world)) * ALIGNMENT * world for group in sizes.groups)
        return found | ({GATHER: sent(GATHER, WORD * flat, world)} if stage else {})
    threshold = work.strategy.param_persistence_threshold
    whole = sum(p for group in sizes.groups for p in group if p <= threshold)
    if work.edge_passes:
        gathered = _gathered_in_slices(sizes, work)
    else:
        gathered = micro_batches * gather(sizes, work.strategy, work.rerun()).received
    return {
        SCATTER: sent(SCATTER, micro_batches * WORD * sizes.total, world),
        GATHER: sent(GATHER, gathered + WORD * whole, world),
    }


def _gathered_in_slices(sizes: Sizes, work: Work) -> int:
    """Bytes gathered in a step, but for what stays whole. Passes without gradients between the others keep DeepSpeed
    from learning the order of modules, so it gives up every weight after each use: forward, backward, where a layer is
    run again and, if it is the head as well, the embedding once more."""
    threshold = work.strategy.param_persistence_threshold
    layers = [
        sum(
            sizes.gathered_bytes((layer, number, index))
            for number, module in enumerate(modules)
            for index, elements in enumerate(module)
            if elements > threshold
        )
        for layer, modules in enumerate(sizes.layers)
    ]
    around = WORD * sum(elements for elements in (sizes.embedding, sizes.rest) if elements > threshold)
    if sizes.head > threshold:
        around += sizes.gathered_bytes((len(layers), 0, 0))
    again = sum(size for size, rerun in zip(layers, work.rerun(), strict=True) if rerun)
    head = WORD * sizes.embedding if sizes.embedding > threshold and not sizes.head else 0
    passes = 2 * work.accumulation + work.edge_passes
    return passes * (sum(layers) + around) + work.accumulation * (again + head)


def sequence_traffic(model: ModelConfig, work: Work, messages: dict[str, dict[str, int]]) -> dict[str, int]:
    """Of one step, between the ranks of a sequence, for a rank with neighbours on both sides, by what is sent.

    `messages` has, by mixer, what a layer sends for one row; a layer that is run again sends all but gradients twice.
    """
    total: Counter[str] = Counter()
    for mixer, again in zip(model.mixers(), work.rerun(), strict=True):
        for kind, count in messages.get(mixer, {}).items():
            gradient = kind.endswith(" gradient")
            passes = work.accumulation * (2 if again and not gradient else 1) + (0 if gradient else work.edge_passes)
            total[kind] += passes * count * work.slice.rows
    return dict(total)
