"""Do two architectures see equally far? Asked before they are given one irreducible loss.

What lies beyond a receptive field cannot be predicted from, however large the model: architectures that see less far
approach a higher loss. If one sees further, its advantage is larger late in the sequence, where more lies behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bst_dist.study.laws.regression import RegressionError, regress
from bst_dist.study.laws.table import Row

LEVEL = 0.05


@dataclass(frozen=True)
class Reach:
    """The advantage in a sequence's last block less that in its first, where nobody has more than a block behind."""

    architecture: str
    difference: float
    """In ln of the loss, mean over pairs of runs; above 0 the architecture sees, or uses, more than the baseline."""
    standard_error: float
    p_value: float
    """Of no difference, two-sided, errors clustered by pair of runs."""

    @property
    def equal(self) -> bool:
        """Whether nothing speaks against equal reach."""
        return self.p_value >= LEVEL


def compare_reach(rows: list[Row], architecture: str, baseline: str) -> Reach | None:
    """Compare over all pairs of finished runs of one block and length; None when too few have losses by position."""
    done = [row for row in rows if row.status == "done" and row.role == "grid" and len(row.loss_by_block) > 1]
    base = {(row.block, row.tokens_per_parameter): row for row in done if row.architecture == baseline}
    differences, clusters = [], []
    for row in (row for row in done if row.architecture == architecture):
        partner = base.get((row.block, row.tokens_per_parameter))
        if partner is not None and len(partner.loss_by_block) == len(row.loss_by_block):
            gaps = np.log(np.divide(partner.loss_by_block, row.loss_by_block))
            differences.append(gaps[-1] - gaps[0])
            clusters.append(row.block)
    try:
        fitted = regress(np.ones((len(differences), 1)), np.array(differences), np.array(clusters))
    except RegressionError:
        return None
    return Reach(architecture, float(fitted.values[0]), float(fitted.standard_errors[0]), fitted.p_value(0))
