"""Shapes of equal size: the width that gives a depth its training FLOPs a token, and exact counts of the result.

A size is N = training FLOPs a token / 6, which is what 6 N D charges. Half the width and four times the depth keep
12 width^2 depth; heads, windows, states and the vocabulary move the exact width, so it is searched for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bst_base.settings import ConfigError, parse
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.flops import forward_flops, train_flops_per_token
from bst_dist.study.sweep.config import ShapeConfig

WIDEST = 2**17


@dataclass(frozen=True)
class Counts:
    """What a model costs, exactly."""

    parameters: float
    """N, training FLOPs a token / 6."""
    total: int
    non_embedding: int
    matrices: int
    """Matrices and the head."""
    kernel: int
    flops_per_token: dict[str, float]
    """Of the forward pass, by term."""


def places(depth: int, fraction: float) -> list[int]:
    """Which layers are under study: round(fraction depth) of them, in the middle of as many equal parts."""
    number = max(1, round(fraction * depth))
    return [int((index + 0.5) * depth / number) for index in range(number)]


def solve(base: dict[str, Any], shape: ShapeConfig, size: float, depth: int, length: int) -> ModelConfig:
    """The model of `depth` layers whose size is nearest to `size`; `base` is the recipe's model section.

    Raises ConfigError when the nearest width misses the size by more than the tolerance.
    """

    def at(heads: int) -> ModelConfig:
        return at_width(base, shape, heads * shape.head_width, depth)

    def size_of(heads: int) -> float:
        return train_flops_per_token(at(heads), length) / 6

    low, high = 1, 2
    while size_of(high) < size and high * shape.head_width < WIDEST:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_of(middle) < size else (low, middle)
    best = min((low, high), key=lambda heads: abs(size_of(heads) / size - 1))
    miss = size_of(best) / size - 1
    if abs(miss) > shape.tolerance:
        raise ConfigError(
            f"no width of {depth} layers comes near N = {size:.3g}: {best * shape.head_width} gives "
            f"{size_of(best):.3g} ({miss:+.0%}); choose another size or depth, a smaller shape.head_width, or a larger "
            "shape.tolerance"
        )
    return at(best)


def at_width(base: dict[str, Any], shape: ShapeConfig, width: int, depth: int) -> ModelConfig:
    """The model of a width, a multiple of the head width, with everything else in proportion."""
    if width % shape.head_width:
        raise ConfigError(f"width {width} is not a multiple of shape.head_width {shape.head_width}")
    own = {"width": width, "heads": width // shape.head_width, "ffn": round(shape.ffn_ratio * width), "depth": depth}
    return parse(ModelConfig, {**base, **own, "placement": places(depth, shape.fraction)}, where="model")


def count(model: ModelConfig, length: int) -> Counts:
    """Exact counts of a model, built on the meta device: nothing is allocated."""
    with torch.device("meta"):
        built = LanguageModel(model)
    groups = {name: sum(p.numel() for p in group) for name, group in built.parameter_groups().items()}
    total, embedding = sum(p.numel() for p in built.parameters()), built.embedding.weight.numel()
    return Counts(
        parameters=train_flops_per_token(model, length) / 6,
        total=total,
        non_embedding=total - embedding,
        matrices=groups["matrices"] + embedding,
        kernel=groups["ssm"],
        flops_per_token=forward_flops(model, length),
    )
