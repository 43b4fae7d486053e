"""The advantage by part ("zone") of the sequence: the first window, the reach of a stack of windows, and beyond it.

A stack of `depth` layers with windows of W tokens sees depth x W tokens. An advantage in the first window does not come
from long-range memory; an advantage only beyond the stack's reach does. Zones depend on the depth of each pair, so the
last zone begins later in deeper models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.gap import Axis, Gaps, pair
from bst_dist.study.laws.observation import Observation
from bst_dist.study.laws.regression import RegressionError, regress
from bst_dist.study.laws.verdict import Answer, columns, judge, mean_gap
from bst_dist.study.statistics import Estimate

ZONES = ("first window", "within reach", "beyond reach")


@dataclass(frozen=True)
class Zone:
    """The advantage of one variant in one zone of the sequence, within an arm."""

    arm: str
    zone: str
    pairs: int
    mean: Estimate
    """In ln of the loss of this zone; above 0 the variant is better."""
    change: Estimate | None
    """Per doubling of depth; None if the pairs do not determine it."""
    answer: Answer | None
    """The rule's answer about depth, from this zone alone; None in the arms without a verdict."""


def zones(
    observed: Sequence[Observation], baseline: str, arm: str, others: Sequence[str], axis: Axis = "flops"
) -> dict[str, list[Zone]]:
    """Return for each variant all zones of every arm with sequences longer than the reach; only `arm` has a verdict."""
    found: dict[str, list[Zone]] = {}
    for name in (arm, *others):
        for zone in ZONES:
            every = _gaps([o for o in observed if o.arm == name], zone, baseline, name, axis)
            absent = len({o.architecture for o in observed if o.arm == name} - {baseline}) - len(every)
            changes = judge(every, absent=absent)[0] if every and name == arm else []
            answers = {c.variant: c.answer for c in changes if c.factor == "depth"}
            for gaps in every:
                found.setdefault(gaps.variant, []).append(
                    Zone(name, zone, gaps.pairs, mean_gap(gaps), _over_depth(gaps), answers.get(gaps.variant))
                )
    return found


def _gaps(observed: Sequence[Observation], zone: str, baseline: str, arm: str, axis: Axis) -> list[Gaps]:
    """Return the gaps of every variant, with the mean loss of the zone in place of the whole loss."""
    parts = [
        replace(o, loss=_loss(o.by_block[_part(o, zone)])) if o.usable else o
        for o in observed
        if not o.usable or len(o.by_block) > o.depth
    ]
    found = []
    for variant in dict.fromkeys(o.architecture for o in parts if o.architecture != baseline):
        try:
            found.append(pair(parts, variant, baseline, arm, axis))
        except UserError:  # no pair: the comparison of the whole loss reports the reason
            continue
    return found


def _loss(by_block: Sequence[float]) -> float:
    """Return the mean over the blocks with valid tokens; NaN if there are none."""
    known = [loss for loss in by_block if not math.isnan(loss)]
    return float(np.mean(known)) if known else math.nan


def _part(o: Observation, zone: str) -> slice:
    """Return the blocks of the sequence that the zone consists of."""
    reach = round(o.depth)
    return {"first window": slice(0, 1), "within reach": slice(1, reach), "beyond reach": slice(reach, None)}[zone]


def _over_depth(gaps: Gaps) -> Estimate | None:
    matrix, names = columns(gaps)
    if "depth" not in names:
        return None
    weights = np.zeros(matrix.shape[1])
    weights[1 + names.index("depth")] = np.log(2)
    try:
        change = regress(matrix, gaps.gap, gaps.stratum).estimate(weights)
    except RegressionError:
        return None
    return None if change.standard_error is None else change
