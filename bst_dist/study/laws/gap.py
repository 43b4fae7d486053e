"""The advantage of an architecture over the baseline, run by run, at equal compute or at equal time.

A pair is a variant's run and the baseline's of the same block: arm, size, depth, seed, hence the same order of data.
The baseline's loss at exactly the variant's compute is read off its own curve, by interpolation in logarithms between
its lengths; a sweep is designed so that the points coincide and the interpolation moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.observation import Observation

Vector = np.ndarray
Axis = Literal["flops", "time_s"]
BEYOND = 0.02
"""How far, in ln of the axis, a baseline's curve may be continued past its ends: the rounding of steps and no more.
For time, whose points cannot be made to coincide, points beyond it are left out."""


@dataclass(frozen=True)
class Gaps:
    """Paired differences of one variant within one arm; every array is (n,)."""

    variant: str
    arm: str
    gap: Vector
    """g = ln L_baseline - ln L_variant at equal cost: above 0 the variant is better."""
    log_gain: Vector
    """ln of the compute-equivalent gain: how many times the cost the baseline needs for the variant's loss, along its
    own curve at this size. Along one size, and not along the frontier: it is what more tokens would have to make up."""
    mismatch: Vector
    """ln N_variant - ln N_baseline: at equal compute a larger model has seen fewer tokens, which moves the gap."""
    flops: Vector
    depth: Vector
    tokens_per_parameter: Vector
    block: Vector
    """The pair of runs a gap belongs to: gaps of one pair are not independent."""
    left_out: tuple[str, ...] = ()
    """Measurements without a partner, and why."""

    def __len__(self) -> int:
        return len(self.gap)

    @property
    def pairs(self) -> int:
        """Independent pairs of runs."""
        return len(np.unique(self.block))

    def take(self, index: Vector) -> Gaps:
        """Some of the pairs, by a mask or by positions."""
        arrays = {name: value[index] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)


def pair(observed: Sequence[Observation], variant: str, baseline: str, arm: str, axis: Axis = "flops") -> Gaps:
    """The gaps of `variant` within an arm; raises UserError when there is no pair."""
    own = [o for o in observed if o.arm == arm]
    curves: dict[str, list[Observation]] = {}
    for o in own:
        if o.architecture == baseline and o.usable:
            curves.setdefault(o.block, []).append(o)
    found, left_out = [], []
    for o in sorted((o for o in own if o.architecture == variant), key=lambda o: (o.block, o.flops)):
        curve = sorted(curves.get(o.block, []), key=lambda c: getattr(c, axis))
        if not o.usable:
            left_out.append(f"{o.name}: its loss is {o.loss}")
        elif not curve:
            left_out.append(f"{o.name}: {baseline} has no finished run in its block")
        elif (at := _read_off(curve, axis, o)) is None:
            left_out.append(f"{o.name}: beyond the baseline's curve in {axis}")
        else:
            found.append((o, *at, np.log(o.parameters / curve[0].parameters)))
    if not found:
        raise UserError(f"no pair of {variant} and {baseline} has finished in arm {arm}: run more of the sweep")
    return Gaps(
        variant=variant,
        arm=arm,
        gap=np.array([gap for _, gap, *_ in found]),
        log_gain=np.array([gain for _, _, gain, _ in found]),
        mismatch=np.array([float(mismatch) for *_, mismatch in found]),
        flops=np.array([o.flops for o, *_ in found]),
        depth=np.array([float(o.depth) for o, *_ in found]),
        tokens_per_parameter=np.array([o.tokens / o.parameters for o, *_ in found]),
        block=np.array([o.block for o, *_ in found]),
        left_out=tuple(left_out),
    )


def gaps_by(observed: Sequence[Observation], variant: str, baseline: str, arm: str,
            part: Literal["by_block", "by_document"]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Gaps by position or by document, a pair of runs of the same length asked for a row, and their blocks.

    Empty where pairs are not of the same parts.
    """
    own = [o for o in observed if o.arm == arm and o.usable and getattr(o, part)]
    base = {(o.block, o.length): getattr(o, part) for o in own if o.architecture == baseline}
    rows, blocks = [], []
    for o in own:
        partner = base.get((o.block, o.length))
        if o.architecture == variant and partner is not None:
            if len(partner) != len(getattr(o, part)) or (rows and len(rows[0]) != len(partner)):
                return np.empty((0, 0)), np.empty(0)
            rows.append(np.log(np.divide(partner, getattr(o, part))))
            blocks.append(o.block)
    return (np.array(rows), np.array(blocks)) if rows else (np.empty((0, 0)), np.empty(0))


def _read_off(curve: list[Observation], axis: Axis, point: Observation) -> tuple[float, float] | None:
    """The gap and ln of the gain of a point against the baseline's curve; None when the curve does not reach it."""
    costs = np.log([getattr(o, axis) for o in curve])
    losses = np.log([o.loss for o in curve])
    cost, loss = float(np.log(getattr(point, axis))), float(np.log(point.loss))
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
