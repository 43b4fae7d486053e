"""A check that two runs are bitwise equal: the recipes, the losses at every step and the final weights.

A run that was stopped and resumed, any number of times, must equal one that never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bst_base.errors import UserError
from bst_base.json_lines import read_lines
from bst_dist.checkpoint.directory import load_weights, newest_valid
from bst_dist.config import differing
from bst_dist.report.metrics import FILE
from bst_dist.train.rundir import read_recipe

# The metrics that depend only on the weights and the data, so they must be equal. Times may differ.
COMPUTED = ("tokens", "loss_nats", "bits_per_byte", "gradient_norm", "learning_rate")


@dataclass(frozen=True)
class Equality:
    """The result of the check. The field names are those of the machine-readable report."""

    runs: tuple[str, str]
    passed: bool
    """Whether they are equal: recipes, losses and weights."""
    recipe_differences: list[str]
    steps: int
    evaluations: int
    checkpoint: str
    """The checkpoint whose weights are compared."""
    largest_difference: dict[str, float]
    """Quantity -> largest difference over all steps; "weights" -> largest difference of any weight."""


def equality(one: Path, other: Path) -> Equality:
    """Compare every step and the final weights of two runs.

    Raises UserError if they have not taken the same steps, or if their newest checkpoints are at different steps.
    """
    recipe = differing(read_recipe(one), read_recipe(other))
    metrics: dict[str, float] = {}
    first, second = _lines(one), _lines(other)
    if odd := sorted(step for kind, step in first.keys() ^ second.keys() if kind == "train"):
        raise UserError(f"{one} and {other} have not taken the same steps: only one of them has step {odd[0]}")
    common = first.keys() & second.keys()  # a run that was stopped may have an additional evaluation there
    for key in sorted(common):
        for name in (name for name in COMPUTED if name in first[key] or name in second[key]):
            difference = _distance(first[key].get(name, float("nan")), second[key].get(name, float("nan")))
            metrics[name] = max(metrics.get(name, 0.0), difference)
    checkpoints = [newest_valid(run_dir) for run_dir in (one, other)]
    if checkpoints[0].name != checkpoints[1].name:
        raise UserError(f"{checkpoints[0]} and {checkpoints[1]}: the runs are at different steps")
    weights = _weights(*map(load_weights, checkpoints))
    return Equality(
        (str(one), str(other)),
        passed=not recipe and weights == 0 and not any(metrics.values()),
        recipe_differences=recipe,
        steps=sum(kind == "train" for kind, _ in common),
        evaluations=sum(kind.startswith("eval") for kind, _ in common),
        checkpoint=checkpoints[0].name,
        largest_difference={**metrics, "weights": weights},
    )


def _lines(run_dir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the metrics lines of a run by (kind and split, step); raises UserError if there are none."""
    lines = read_lines(run_dir / FILE)
    if not lines:
        raise UserError(f"{run_dir}: no {FILE}, or nothing in it; has the run taken a step?")
    return {(f"{line['kind']} {line.get('split', '')}".strip(), line["step"]): line for line in lines}


def _weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any weight; infinity if names or shapes differ."""
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (one, other)]
    if shapes[0] != shapes[1]:
        return float("inf")
    return max(_distance(one[name], other[name]) for name in one)


def _distance(a: Any, b: Any) -> float:
    """Return the largest absolute difference. It is infinity if only one is NaN, and 0 for equal values and two NaN."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=torch.inf)).max())
