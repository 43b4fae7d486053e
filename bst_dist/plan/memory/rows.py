"""Choose the number of rows to trace a layer with, so that tensors with rows can be told from others by their size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from typing import Any

from torch import nn

from bst_dist.model.config import ModelConfig

FEWEST = 1009
"""Smallest number of rows: far more than in a micro-batch, so that weights are small beside tensors with rows."""


def rows_to_trace(layer: nn.Module, settings: ModelConfig, length: int) -> int:
    """Return the first prime, from FEWEST on, that divides no size in the layer.

    Then the bytes of a tensor are a multiple of it exactly if the tensor has rows.
    """
    sizes = {size for size in _sizes(layer, settings, length) if size > 0}
    return next(n for n in count(FEWEST) if _is_prime(n) and all(size % n for size in sizes))


def _sizes(layer: nn.Module, settings: ModelConfig, length: int) -> Iterator[int]:
    """Yield all sizes that are not rows.

    They are the sequence length, the sizes of parameters, and all numbers n in the settings; also n + 1 (a table of
    distances or powers), n plus the length, and the widths of linear maps fused to one product.
    """
    yield length
    for parameter in layer.parameters():
        yield from parameter.shape
    for number in _numbers(settings.model_dump()):
        yield from (number, number + 1, length + number)
    yield from _together(layer)


def _together(layer: nn.Module) -> set[int]:
    """Return the output widths of all combinations of linear maps that have the same input width."""
    rows: dict[int, list[int]] = {}
    for one in layer.modules():
        if isinstance(one, nn.Linear):
            rows.setdefault(one.in_features, []).append(one.out_features)
    found: set[int] = set()
    for maps in rows.values():
        sums = {0}
        for size in maps:
            sums |= {one + size for one in sums}
        found |= sums
    return found


def _numbers(settings: Any) -> Iterator[int]:
    """Yield the whole numbers in nested settings."""
    if isinstance(settings, dict):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for one in settings:
            yield from _numbers(one)
    elif isinstance(settings, int) and not isinstance(settings, bool):
        yield settings


def _is_prime(n: int) -> bool:
    return all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
