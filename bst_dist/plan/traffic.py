"""Bytes that one rank sends per step, by kind.

Collectives of all ranks are assumed to be rings, as in backends for large messages: an all-reduce sends every byte
twice, an all-gather and a reduce-scatter once. Planned and measured collectives are both counted with `sent`.
"""

from __future__ import annotations

from collections import Counter

from bst_dist.model.config import ModelConfig
from bst_dist.plan.memory.gathering import gather
from bst_dist.plan.memory.peak import Work
from bst_dist.plan.memory.zero import ALIGNMENT, WORD, Sizes, muon_load

REDUCE, GATHER, SCATTER = "gradients: all-reduce", "weights: all-gather", "gradients: reduce-scatter"
MOMENTUM = "momentum: all-to-all"


def sent(kind: str, whole: float, ranks: int) -> float:
    """Return the bytes that one of `ranks` sends in a collective; `whole`: bytes of the reduced or gathered tensor."""
    rounds = {REDUCE: 2, GATHER: 1, SCATTER: 1}[kind]
    return rounds * whole * (ranks - 1) / ranks


def zero_traffic(sizes: Sizes, work: Work) -> dict[str, float]:
    """Return the bytes sent per step for gradients, weights and Muon's momentum.

    Norms and flags, a few bytes per step, are left out.
    """
    if work.world == 1:
        return {}
    found = _gradients_and_weights(sizes, work)
    if sizes.muon and work.strategy.stage:
        found[MOMENTUM] = muon_load(sizes, work.strategy.stage, work.world).sent
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
    """Return the bytes gathered per step when training in slices, without parameters that stay gathered.

    The passes without gradients prevent DeepSpeed from recording the order of modules, so it releases every weight
    after each use: in forward, in backward, when a layer is recomputed and, for an embedding that is also the head,
    once more.
    """
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
    """Return the bytes that a rank with two neighbours sends per step to the ranks that share its sequence, by kind.

    `messages`: by mixer, the bytes that a layer sends for one row. A recomputed layer sends everything but gradients
    twice.
    """
    total: Counter[str] = Counter()
    for mixer, again in zip(model.mixers(), work.rerun(), strict=True):
        for kind, count in messages.get(mixer, {}).items():
            gradient = kind.endswith(" gradient")
            passes = work.accumulation * (2 if again and not gradient else 1) + (0 if gradient else work.edge_passes)
            total[kind] += passes * count * work.slice.rows
    return dict(total)
