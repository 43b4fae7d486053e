"""Test whether two architectures have an equally long receptive field, before they may share one irreducible loss.

No model size makes up for text outside of the receptive field: an architecture with a shorter one approaches a higher
loss. If one has a longer receptive field, its advantage is larger late in the sequence, where there is more past text.
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
class ReceptiveField:
    """Whether an architecture has as long a receptive field as the baseline."""

    difference: Estimate
    """The advantage in the last block of the sequence minus the advantage in the first block, where no model has more
    than one block of past. In ln of the loss, errors clustered by pair of runs. Above 0 the architecture uses more of
    the past than the baseline."""
    answer: Equality
    """"equal": the difference is shown to be less than the margin, 0.5 % of the loss."""


def compare_receptive_fields(
    observed: Sequence[Observation], variant: str, baseline: str, arm: str
) -> ReceptiveField | None:
    """Compare over all pairs of runs of one stratum and length; return None if too few have losses by position."""
    gaps, strata = gaps_by(observed, variant, baseline, arm, "by_block")
    if gaps.shape[1] < 2:
        return None
    late = gaps[:, -1] - gaps[:, 0]
    if not np.isfinite(late).all():  # no validation sequence is long enough to have a label in the last block
        return None
    try:
        difference = regress(np.ones((len(late), 1)), late, strata).estimate(0)
    except RegressionError:
        return None
    return ReceptiveField(difference, equality(difference, MARGIN))
