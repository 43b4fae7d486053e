"""ZeRO-3's gathered weights: how many are whole at once, and how often each is gathered.

A module's parameters are gathered before it runs and given up after, unless they are used again within
`max_reuse_distance` elements of other parameters; some are gathered ahead. So those of the top layers stay from the
forward to the backward pass, and all others are gathered once more there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bst_dist.plan.zero import WORD, Sizes, Strategy


@dataclass(frozen=True)
class Gathered:
    """Of one micro-batch."""

    forward: tuple[int, ...]
    """Bytes of whole weights while each layer runs forward."""
    backward: tuple[int, ...]
    """The same in the backward pass."""
    between: int
    """After the last layer, where the loss is computed."""
    received_elements: int
    """Elements that are gathered in all."""


def gather(sizes: Sizes, strategy: Strategy, rerun: Sequence[bool]) -> Gathered:
    """Gathered weights of every layer; `rerun` says which layers run again in the backward pass."""
    spread = [[p for p in layer if p > strategy.param_persistence_threshold] for layer in sizes.layers]
    kept, times = _kept_and_times(spread, strategy.max_reuse_distance, rerun)
    ahead = [min(strategy.prefetch_bucket_size, sum(map(sum, spread[i + 1 :]))) for i in range(len(spread))]
    behind = [min(strategy.prefetch_bucket_size, sum(map(sum, spread[:i])) - sum(kept[:i])) for i in range(len(spread))]
    always = sizes.embedding if sizes.embedding > strategy.param_persistence_threshold else 0
    own = [sum(layer) for layer in spread]
    forward = [always + sum(kept[:i]) + own[i] + ahead[i] for i in range(len(own))]
    backward = [always + sum(kept[:i]) + own[i] + behind[i] for i in range(len(own))]
    return Gathered(
        tuple(WORD * elements for elements in forward),
        tuple(WORD * elements for elements in backward),
        WORD * (always + sum(kept)),
        always + times,
    )


def _kept_and_times(spread: list[list[int]], distance: int, rerun: Sequence[bool]) -> tuple[list[int], int]:
    """By layer, the elements that stay until the backward pass; and the elements gathered, all times counted."""
    kept, times, above = [0] * len(spread), 0, 0
    for index in reversed(range(len(spread))):
        uses = 3 if rerun[index] else 2  # of each parameter that runs between a pass forward and the one back
        inside = 0
        for parameter in reversed(spread[index]):
            stays = uses * (above + inside) < distance
            kept[index] += parameter if stays else 0
            times += parameter * (1 if stays else 2)
            times += parameter if rerun[index] and 2 * inside >= distance else 0
            inside += parameter
        above += inside
    return kept, times
