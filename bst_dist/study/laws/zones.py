"""Where in a sequence an advantage lies: in the first window, as far as a stack of windows sees, or beyond.

A stack of `depth` layers with windows of W tokens sees depth x W tokens. What is ahead in the first window is better
without any reach; what is ahead only beyond the stack's reach remembers. Zones follow the depth of each pair, so the
last one begins later in deeper models.
"""

from __future__ import annotations

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
    """The advantage of one variant in one part of the sequence, within an arm."""

    arm: str
    zone: str
    pairs: int
    mean: Estimate
    """In ln of the loss of this part; above 0 the variant is better."""
    change: Estimate | None
    """Per doubling of depth; None where the pairs do not determine it."""
    answer: Answer | None
    """By the rule, applied to this part alone; None in the arms without a verdict."""


def zones(observed: Sequence[Observation], baseline: str, arm: str, others: Sequence[str],
          axis: Axis = "flops") -> dict[str, list[Zone]]:  # fmt: skip
    """By variant: every zone of every arm in which sequences go beyond the reach; a verdict only in `arm`."""
    found: dict[str, list[Zone]] = {}
    for name in (arm, *others):
        for zone in ZONES:
            every = _gaps([o for o in observed if o.arm == name], zone, baseline, name, axis)
            changes = judge(every)[0] if every and name == arm else []
            answers = {c.variant: c.answer for c in changes if c.factor == "depth"}
            for gaps in every:
                found.setdefault(gaps.variant, []).append(
                    Zone(name, zone, gaps.pairs, mean_gap(gaps), _over_depth(gaps), answers.get(gaps.variant))
                )
    return found


def _gaps(observed: Sequence[Observation], zone: str, baseline: str, arm: str, axis: Axis) -> list[Gaps]:
    """The gaps of every variant, with the mean loss of the zone in the place of the loss."""
    parts = [replace(o, loss=float(np.mean(o.by_block[_part(o, zone)]))) for o in observed
             if o.usable and len(o.by_block) > o.depth]  # fmt: skip
    found = []
    for variant in dict.fromkeys(o.architecture for o in parts if o.architecture != baseline):
        try:
            found.append(pair(parts, variant, baseline, arm, axis))
        except UserError:  # no pair: said with the whole loss
            continue
    return found


def _part(o: Observation, zone: str) -> slice:
    """Which blocks of the sequence the zone is."""
    reach = round(o.depth)
    return {"first window": slice(0, 1), "within reach": slice(1, reach), "beyond reach": slice(reach, None)}[zone]


def _over_depth(gaps: Gaps) -> Estimate | None:
    matrix, names = columns(gaps)
    if "depth" not in names:
        return None
    weights = np.zeros(matrix.shape[1])
    weights[1 + names.index("depth")] = np.log(2)
    try:
        return regress(matrix, gaps.gap, gaps.block).estimate(weights)
    except RegressionError:
        return None
