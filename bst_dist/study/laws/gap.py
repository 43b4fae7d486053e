"""The advantage of an architecture over the baseline for each pair of runs, at equal compute or at equal time.

A pair is a run of the variant and a run of the baseline in the same stratum: same arm, size, depth and seed, so the
same order of data. The baseline's loss at the variant's compute is interpolated, in logarithms, between the lengths of
the baseline's curve. A sweep is designed so that the points coincide and the interpolation changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.observation import Observation, same_text

Vector = np.ndarray
Axis = Literal["flops", "time_s"]
BEYOND = 0.02
"""How far, in ln of the axis, a baseline's curve may be extrapolated. It only allows for the rounding of steps. Points
further out are left out, which happens at equal time, where the points cannot be made to coincide."""


@dataclass(frozen=True)
class Gaps:
    """Paired differences of one variant within one arm; every array is (n,)."""

    variant: str
    arm: str
    gap: Vector
    """g = ln L_baseline - ln L_variant at equal cost: above 0 the variant is better."""
    log_gain: Vector
    """ln of the compute-equivalent gain: the cost at which the baseline reaches the variant's loss, divided by the
    variant's cost. It is read from the baseline's curve at this size, not from the compute-optimal frontier, so the
    extra cost is more tokens for the same model. NaN if the baseline's curve does not reach the variant's loss."""
    mismatch: Vector
    """ln N_variant - ln N_baseline. At equal compute a larger model has seen fewer tokens, which changes the gap."""
    flops: Vector
    depth: Vector
    tokens_per_parameter: Vector
    stratum: Vector
    """The pair of runs that each gap belongs to. Gaps of one pair are not independent."""
    left_out: tuple[str, ...] = ()
    """Measurements without a pair, each with the reason; those that are not done yet as their number."""

    def __post_init__(self) -> None:
        """Raise UserError if a gap is no finite number: it would make every mean and verdict NaN."""
        if not np.isfinite(self.gap).all():
            raise UserError(f"a gap of {self.variant} is not a number: {self.stratum[~np.isfinite(self.gap)][0]}")

    def __len__(self) -> int:
        return len(self.gap)

    @property
    def pairs(self) -> int:
        """Number of independent pairs of runs."""
        return len(np.unique(self.stratum))

    def take(self, index: Vector) -> Gaps:
        """Return the gaps selected by a mask or by indices."""
        arrays = {name: value[index] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)


def pair(observed: Sequence[Observation], variant: str, baseline: str, arm: str, axis: Axis = "flops") -> Gaps:
    """Return the gaps of `variant` within an arm; raises UserError if there is no pair."""
    own = [o for o in observed if o.arm == arm]
    curves: dict[str, list[Observation]] = {}
    for o in (o for o in own if o.architecture == baseline):
        curves.setdefault(o.stratum, []).append(o)
    found, left_out = [], []
    for o in sorted((o for o in own if o.architecture == variant), key=lambda o: (o.stratum, o.flops)):
        every = curves.get(o.stratum, [])
        curve = sorted((c for c in every if c.usable), key=lambda c: getattr(c, axis))
        if (problem := _problem(o, every, baseline)) is not None:
            left_out.append(problem)
        elif (at := _read_off(curve, axis, o)) is None:
            left_out.append(_Unpaired(o.name, f"beyond the baseline's curve in {axis}"))
        else:
            found.append((o, *at, np.log(o.parameters / curve[0].parameters)))
    if not found:
        raise UserError(f"no pair of {variant} and {baseline} has finished in arm {arm}{_counted(left_out)}")
    return Gaps(
        variant=variant,
        arm=arm,
        gap=np.array([gap for _, gap, *_ in found]),
        log_gain=np.array([gain for _, _, gain, _ in found]),
        mismatch=np.array([float(mismatch) for *_, mismatch in found]),
        flops=np.array([o.flops for o, *_ in found]),
        depth=np.array([float(o.depth) for o, *_ in found]),
        tokens_per_parameter=np.array([o.tokens / o.parameters for o, *_ in found]),
        stratum=np.array([o.stratum for o, *_ in found]),
        left_out=tuple(_lines(left_out, variant)),
    )


class _Unpaired(NamedTuple):
    """A measurement of the variant without a pair."""

    name: str
    why: str
    reason: str = ""
    """Why the run failed or diverged."""
    later: bool = False
    """Whether it may still get a pair: a run is waiting or running."""


def _problem(o: Observation, of_stratum: Sequence[Observation], baseline: str) -> _Unpaired | None:
    """Return why a measurement has no pair; None if it may have one. `of_stratum`: the baseline's in its stratum."""
    later = ("waiting", "running")
    if o.status != "done":
        return _Unpaired(o.name, o.status, o.reason, o.status in later)
    if not o.usable:
        return _Unpaired(o.name, f"its loss is {o.loss}")
    partner = next((c for c in of_stratum if c.length == o.length and not c.usable), None)
    if partner is not None and partner.status == "done":
        return _Unpaired(o.name, f"the loss of {baseline} in the same stratum is {partner.loss}")
    if partner is not None:
        why = f"the run of {baseline} in the same stratum is not done ({partner.status})"
        return _Unpaired(o.name, why, partner.reason, partner.status in later)
    curve = [c for c in of_stratum if c.usable]
    if not curve:
        return _Unpaired(o.name, f"{baseline} has no finished run in its stratum")
    if len({c.flops for c in curve}) < len(curve):
        return _Unpaired(o.name, f"two runs of {baseline} in the same stratum have the same compute")
    if not all(same_text(o.corpora, c.corpora) for c in curve):
        return _Unpaired(o.name, f"trained on other text than the run of {baseline}")
    return None


def _lines(left_out: Sequence[_Unpaired], variant: str) -> list[str]:
    """Return one line per measurement, and one line for all that are not done yet for the same reason."""
    later = Counter(one.why for one in left_out if one.later)
    return [": ".join(filter(None, (one.name, one.why, one.reason))) for one in left_out if not one.later] + [
        f"{count} run{'s' * (count > 1)} of {variant}: {why}" for why, count in later.items()
    ]


def _counted(left_out: Sequence[_Unpaired]) -> str:
    """Return the end of the message that there is no pair: the reasons, and what to do."""
    counts = Counter(one.why for one in left_out)
    told = ", ".join(f"{count} {why}" for why, count in counts.items())
    more = not left_out or any(one.later for one in left_out)
    return (f": of its runs {told}" if told else "") + (": run more of the sweep" if more else "")


def gaps_by(
    observed: Sequence[Observation], variant: str, baseline: str, arm: str, part: Literal["by_block", "by_document"]
) -> tuple[np.ndarray, np.ndarray]:
    """Return gaps by position or document, one row per pair of runs with the same planned length, and the rows' strata.

    Both are empty if the pairs differ in their number of positions or documents.
    """
    own = [o for o in observed if o.arm == arm and o.usable and getattr(o, part)]
    base = {(o.stratum, o.length): o for o in own if o.architecture == baseline}
    rows, strata = [], []
    for o in own:
        partner = base.get((o.stratum, o.length))
        if o.architecture == variant and partner is not None and same_text(o.corpora, partner.corpora):
            mine, theirs = getattr(o, part), getattr(partner, part)
            if len(theirs) != len(mine) or (rows and len(rows[0]) != len(theirs)):
                return np.empty((0, 0)), np.empty(0)
            rows.append(np.log(np.divide(theirs, mine)))
            strata.append(o.stratum)
    return (np.array(rows), np.array(strata)) if rows else (np.empty((0, 0)), np.empty(0))


def _read_off(curve: list[Observation], axis: Axis, point: Observation) -> tuple[float, float] | None:
    """Return the gap and ln of the gain of a point against the baseline's curve; None beyond the ends of the curve."""
    costs = np.log([getattr(o, axis) for o in curve])
    losses = np.log([o.loss for o in curve])
    cost, loss = float(np.log(getattr(point, axis))), float(np.log(point.loss))
    if not costs[0] - BEYOND <= cost <= costs[-1] + BEYOND:
        return None
    gap = float(_along(costs, losses, cost)) - loss
    # The inverse needs losses that fall along the curve. The running minimum removes rises, which are noise.
    falling = np.minimum.accumulate(losses)
    kept = np.concatenate(([True], np.diff(falling) < 0))
    if kept.sum() < 2:
        return gap, float("nan")
    reached = float(_along(-falling[kept], costs[kept], -loss))
    inside = costs[kept][0] - BEYOND <= reached <= costs[kept][-1] + BEYOND
    return gap, reached - cost if inside else float("nan")


def _along(x: Vector, y: Vector, at: float) -> float:
    """Interpolate linearly; outside of `x`, extrapolate with the slope of the first or last segment."""
    if len(x) == 1:
        return y[0]
    left = int(np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2))
    return y[left] + (y[left + 1] - y[left]) * (at - x[left]) / (x[left + 1] - x[left])
