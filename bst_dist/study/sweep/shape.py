"""Shapes of equal size: the width and ffn with which a given depth reaches a size, and the counts of the result.

The size is N = training FLOPs per token / 6, as `plan.flops` counts them, so that the compute is 6 N D.
Half the width and four times the depth keep 12 width^2 depth constant, but heads, windows, states and the vocabulary
change N. So shapes are found by search. Models that are compared must have equal size: at equal compute a larger model
has seen fewer tokens, which biases the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bst_base.settings import ConfigError, parse
from bst_dist.model.config import ModelConfig
from bst_dist.model.lm import LanguageModel
from bst_dist.model.meta_device import weightless
from bst_dist.plan.flops import forward_flops, train_flops_per_token
from bst_dist.study.sweep.config import ShapeConfig

WIDEST = 2**17
OFF = 0.1
"""Largest relative difference between the common size and the requested size."""
RATIO = 1.5
"""Largest factor between ffn / width and the requested ratio, in either direction."""


@dataclass(frozen=True)
class Counts:
    """Exact counts of a model's parameters and FLOPs."""

    parameters: float
    """N, training FLOPs per token / 6."""
    total: int
    non_embedding: int
    """All parameters except those of embedding and head."""
    matrices: int
    """Parameters in matrices, including the head."""
    kernel: int
    """Parameters of the SSM dynamics."""
    flops_per_token: dict[str, float]
    """FLOPs of the forward pass per token, by term."""


def places(depth: int, fraction: float) -> list[int]:
    """Return the layers with the architecture's mixer: round(fraction x depth) of them, evenly spread."""
    number = max(1, round(fraction * depth))
    return [int((index + 0.5) * depth / number) for index in range(number)]


@dataclass(frozen=True)
class Model:
    """A width and ffn that reach a size."""

    width: int
    ffn: int
    parameters: float
    off: float
    """(ffn / width) / the requested ratio."""

    def config(self, base: dict[str, Any], shape: ShapeConfig, depth: int) -> ModelConfig:
        """Return the model section of the recipe; `base` holds its other settings."""
        return _model(base, shape, self.width, self.ffn, depth)


def solve_together(
    bases: Mapping[str, tuple[dict[str, Any], int]], shape: ShapeConfig, size: float, depth: int
) -> dict[str, Model]:
    """Return models of `depth` layers with equal size; `bases` is name -> (model section, sequence length).

    Width is chosen in steps of a head, and ffn in steps of 8. All models are within half the tolerance of a common N.
    This N is as close to the requested size as possible. Among the models within this range, the one with ffn / width
    closest to `ffn_ratio` is taken. Raises ConfigError if no common N exists.
    """
    found = {name: _models(base, shape, size, depth, length) for name, (base, length) in bases.items()}
    misses = {}
    for aim in sorted(size * (1 + OFF * np.linspace(-1, 1, 401)), key=lambda n: abs(n / size - 1)):
        chosen = {name: _nearest(models, aim, shape) for name, models in found.items()}
        misses[aim] = max(abs(m.parameters / aim - 1) if m else np.inf for m in chosen.values())
        if misses[aim] <= shape.tolerance / 2:
            return {name: model for name, model in chosen.items() if model}
    aim = min(misses, key=lambda n: misses[n])
    raise ConfigError(
        f"no shapes of {depth} layers have equal size near N = {size:.3g}: at best they lie within {misses[aim]:.2%} "
        f"of {aim:.3g}, and {shape.tolerance / 2:.2%} is allowed (shape.tolerance); choose a larger size, fewer "
        "layers or a smaller shape.head_width"
    )


def _models(base: dict[str, Any], shape: ShapeConfig, size: float, depth: int, length: int) -> list[Model]:
    """Return all models near a size: for each width, the range of ffn that reaches it. N is linear in the ffn."""
    found, ratio = [], ffn_ratio(base, shape)
    for heads in range(1, WIDEST // shape.head_width):
        if heads % ((base.get("attention") or {}).get("kv_heads") or 1):
            continue
        width = heads * shape.head_width
        least, most = (train_flops_per_token(_model(base, shape, width, ffn, depth), length) / 6 for ffn in (8, 16))
        per_step = most - least
        if least - per_step > size * (1 + OFF):
            break
        steps = (size - least) / per_step + 1
        reach = OFF * size / per_step + 1
        for step in range(max(1, math.floor(steps - reach)), math.ceil(steps + reach) + 1):
            off = 8 * step / width / ratio
            if 1 / RATIO <= off <= RATIO:
                found.append(Model(width, 8 * step, least + (step - 1) * per_step, off))
    return found


def _nearest(models: Sequence[Model], aim: float, shape: ShapeConfig) -> Model | None:
    """Return the model closest to the ratio among those within half the tolerance; else the one closest in size."""
    near = [m for m in models if abs(m.parameters / aim - 1) <= shape.tolerance / 2]
    if near:
        return min(near, key=lambda m: (abs(math.log(m.off)), m.width))
    return min(models, key=lambda m: abs(m.parameters / aim - 1), default=None)


def at_width(base: dict[str, Any], shape: ShapeConfig, width: int, depth: int) -> ModelConfig:
    """Return the model with this width, a multiple of the head width, and everything else in proportion."""
    if width % shape.head_width:
        raise ConfigError(f"width {width} is not a multiple of shape.head_width {shape.head_width}")
    return _model(base, shape, width, round(ffn_ratio(base, shape) * width), depth)


def ffn_ratio(base: dict[str, Any], shape: ShapeConfig) -> float:
    """Return the requested ffn / width. With swiglu, which has three matrices instead of two, it is two thirds of
    `shape.ffn_ratio`, so that the number of parameters is the same."""
    return shape.ffn_ratio * (2 / 3 if base.get("activation") == "swiglu" else 1)


def _model(base: dict[str, Any], shape: ShapeConfig, width: int, ffn: int, depth: int) -> ModelConfig:
    if base.get("head_width") not in (None, shape.head_width):
        raise ConfigError(
            f"model.head_width is {base['head_width']} and shape.head_width {shape.head_width}: leave the first one "
            "out: a sweep makes models wider by adding heads"
        )
    own = {"width": width, "heads": width // shape.head_width, "ffn": ffn, "depth": depth}
    return parse(ModelConfig, {**base, **own, "placement": places(depth, shape.fraction)}, where="model")


_COUNTED: dict[tuple[str, int], Counts] = {}


def count(model: ModelConfig, length: int) -> Counts:
    """Return the counts of a model, built on the meta device without memory. The process caches the results."""
    key = (model.model_dump_json(), length)
    if key not in _COUNTED:
        _COUNTED[key] = _count(model, length)
    return _COUNTED[key]


def _count(model: ModelConfig, length: int) -> Counts:
    with weightless():
        built = LanguageModel(model)
    groups = {name: sum(p.numel() for p in group) for name, group in built.parameter_groups().items()}
    total, head = sum(p.numel() for p in built.parameters()), built.head_matrix.numel()
    around = head if model.tied else 2 * head
    return Counts(
        parameters=train_flops_per_token(model, length) / 6,
        total=total,
        non_embedding=total - around,
        matrices=groups["matrices"] + head,
        kernel=groups["ssm"],
        flops_per_token=forward_flops(model, length),
    )
