"""Do two architectures see equally far? Asked before they are given one irreducible loss.

What lies beyond a receptive field cannot be predicted from, however large the model: architectures that see less far
approach a higher loss. If one sees further, its advantage is larger late in the sequence, where more lies behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bst_dist.study.laws.gap import gaps_by
from bst_dist.study.laws.observation import Observation
from bst_dist.study.laws.regression import RegressionError, regress
from bst_dist.study.statistics import Equality, Estimate, equality

MARGIN = 0.005


@dataclass(frozen=True)
class Reach:
    """Whether an architecture sees as far as the baseline."""

    difference: Estimate
    """The advantage in a sequence's last block less that in its first, where nobody has more than a block behind: in ln
    of the loss, errors clustered by pair of runs. Above 0 the architecture sees, or uses, more than the baseline."""
    answer: Equality
    """equal: shown to differ by less than the margin, 0.5 % of the loss."""


def compare_reach(observed: Sequence[Observation], variant: str, baseline: str, arm: str) -> Reach | None:
    """Over all pairs of runs of one block and length; None when too few have losses by position."""
    gaps, blocks = gaps_by(observed, variant, baseline, arm, "by_block")
    if gaps.shape[1] < 2:
        return None
    late = gaps[:, -1] - gaps[:, 0]
    try:
        difference = regress(np.ones((len(late), 1)), late, blocks).estimate(0)
    except RegressionError:
        return None
    return Reach(difference, equality(difference, MARGIN))
