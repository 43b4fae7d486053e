"""The advantage of an architecture over the baseline, run by run, at equal compute or at equal time.

A pair is a variant's trunk and the baseline's of the same block: size, depth, seed, hence the same order of the data.
The baseline's loss at exactly the variant's compute is read off its own curve, by interpolation in logarithms between
its branches; a sweep is designed so that the points coincide and the interpolation moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.table import Row

Vector = np.ndarray
Axis = Literal["flops", "time_s"]
BEYOND = 0.02
"""How far, in ln of the axis, a baseline's curve may be continued past its ends: the rounding of steps and no more.
For time, whose points cannot be made to coincide, points beyond it are left out."""


@dataclass(frozen=True)
class Gaps:
    """Paired differences of one variant; every array is (n,)."""

    variant: str
    gap: Vector
    """g = ln L_baseline - ln L_variant at equal cost: above 0 the variant is better."""
    log_gain: Vector
    """ln of the compute-equivalent gain: how many times the cost the baseline needs for the variant's loss, along its
    own curve at this size. Along one size, and not along the frontier: it is what more tokens would have to make up."""
    flops: Vector
    depth: Vector
    tokens_per_parameter: Vector
    block: Vector
    """The pair of runs a gap belongs to: gaps of one pair are not independent."""
    left_out: tuple[str, ...]
    """Runs without a partner, and why."""

    def __len__(self) -> int:
        return len(self.gap)


def pair(rows: list[Row], variant: str, baseline: str, axis: Axis = "flops") -> Gaps:
    """The gaps of `variant` in the finished rows of a table; raises UserError when no pair is there."""
    done = [row for row in rows if row.status == "done" and row.role == "grid"]
    curves: dict[str, list[Row]] = {}
    for row in done:
        if row.architecture == baseline:
            curves.setdefault(row.block, []).append(row)
    found, left_out = [], []
    for row in sorted((r for r in done if r.architecture == variant), key=lambda r: (r.block, r.flops)):
        curve = sorted(curves.get(row.block, []), key=lambda r: getattr(r, axis))
        if not curve:
            left_out.append(f"{row.run}: {baseline} has no finished run in its block")
        elif (at := _read_off(curve, axis, row)) is None:
            left_out.append(f"{row.run}: beyond the baseline's curve in {axis}")
        else:
            found.append((row, *at))
    if not found:
        raise UserError(f"no pair of {variant} and {baseline} has finished: run more of the sweep")
    return Gaps(
        variant=variant,
        gap=np.array([gap for _, gap, _ in found]),
        log_gain=np.array([gain for *_, gain in found]),
        flops=np.array([row.flops for row, *_ in found]),
        depth=np.array([float(row.depth) for row, *_ in found]),
        tokens_per_parameter=np.array([row.tokens / row.parameters for row, *_ in found]),
        block=np.array([row.block for row, *_ in found]),
        left_out=tuple(left_out),
    )


def _read_off(curve: list[Row], axis: Axis, row: Row) -> tuple[float, float] | None:
    """The gap and ln of the gain of `row` against the baseline's curve; None when the curve does not reach it."""
    costs = np.log([getattr(point, axis) for point in curve])
    losses = np.log([point.loss_nats for point in curve])
    cost, loss = float(np.log(getattr(row, axis))), float(np.log(row.loss_nats))
    if not costs[0] - BEYOND <= cost <= costs[-1] + BEYOND:
        return None
    gap = float(_along(costs, losses, cost)) - loss
    # Losses fall along the curve; noise may make them rise for a moment, which the running minimum takes out.
    falling = np.minimum.accumulate(losses)
    kept = np.concatenate(([True], np.diff(falling) < 0))
    if kept.sum() < 2:
        return gap, float("nan")
    return gap, float(_along(-falling[kept], costs[kept], -loss)) - cost


def _along(x: Vector, y: Vector, at: float) -> float:
    """Linear interpolation, continued with the slope of the first or the last piece."""
    if len(x) == 1:
        return y[0]
    left = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
    return y[left] + (y[left + 1] - y[left]) * (at - x[left]) / (x[left + 1] - x[left])
