"""How many rows a layer is traced with, so that its bytes tell what grows with the rows and what does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from typing import Any

from torch import nn

from bst_dist.model.config import ModelConfig

FEWEST = 1009
"""Many more than a micro-batch has, so that weights weigh little beside what grows with the rows."""


def rows_to_trace(layer: nn.Module, settings: ModelConfig, length: int) -> int:
    """The first prime from FEWEST on that divides no size of the layer: then the bytes of a tensor are a multiple of it
    where the tensor has the rows, and nowhere else."""
    sizes = {size for size in _sizes(layer, settings, length) if size > 0}
    return next(n for n in count(FEWEST) if _is_prime(n) and all(size % n for size in sizes))


def _sizes(layer: nn.Module, settings: ModelConfig, length: int) -> Iterator[int]:
    """Of all that has no rows: of parameters, of the sequence, of what the settings give a size to, as well with one
    more (a table of distances, or of powers) or in front of the sequence; and of maps put together to one product."""
    yield length
    for parameter in layer.parameters():
        yield from parameter.shape
    for number in _numbers(settings.model_dump()):
        yield from (number, number + 1, length + number)
    yield from _together(layer)


def _together(layer: nn.Module) -> set[int]:
    """Rows of any of the maps of one input."""
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
    """Whole numbers in nested settings."""
    if isinstance(settings, dict):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for one in settings:
            yield from _numbers(one)
    elif isinstance(settings, int) and not isinstance(settings, bool):
        yield settings


def _is_prime(n: int) -> bool:
    return all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
