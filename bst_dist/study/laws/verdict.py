"""Does the advantage grow or shrink with depth and with compute? Answered by a rule that stands before the data.

The rule. For each variant the paired gap is regressed on the logarithms of compute, depth and tokens per parameter,
errors clustered by pair of runs. The *change* over a factor is its coefficient times the factor's range in the sweep:
how much of the loss, in per cent, the advantage gains from the least to the largest value. Then, with p values adjusted
by Holm over all variants and factors, at level 0.05:

1. equivalent: both one-sided tests reject a change as large as the margin (0.5 %). A change that is real and smaller
   than that is equivalent too: nobody would choose an architecture by it.
2. grows or shrinks: the change differs from 0 both by its t test and by permutation (the larger p counts).
3. undecided otherwise, with the number of pairs that would be needed to see a change as large as the margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from bst_dist.study.laws.gap import Gaps
from bst_dist.study.laws.regression import Regression, equivalence_p, holm, permutation_p, regress

LEVEL, POWER, MARGIN = 0.05, 0.8, 0.005
FACTORS = ("flops", "depth", "tokens_per_parameter")
ASKED = ("flops", "depth")
"""The factors that a verdict is given about; tokens per parameter is there so that it does not stand for compute."""
Answer = Literal["grows", "shrinks", "equivalent", "undecided"]


@dataclass(frozen=True)
class Change:
    """How the advantage of one variant changes over one factor."""

    variant: str
    factor: str
    change: float
    """In ln of the loss, from the least to the largest value of the factor in the sweep."""
    standard_error: float
    low: float
    """Of the 95 % interval."""
    high: float
    from_value: float
    to_value: float
    p_difference: float
    """Holm-adjusted, the larger of the t test's and the permutation's."""
    p_robust: float
    p_permutation: float
    p_equivalence: float
    """Holm-adjusted."""
    answer: Answer
    pairs: int
    """Independent pairs of runs."""
    more_pairs: int
    """Where undecided: how many more like these would show a change as large as the margin with power 0.8."""


def columns(gaps: Gaps) -> tuple[np.ndarray, list[str]]:
    """Intercept and centred logarithms of the factors that vary: (n, p) and their names."""
    logs = {name: np.log(getattr(gaps, name)) for name in FACTORS}
    varying = [name for name in FACTORS if np.ptp(logs[name]) > 0.05]
    centred = [logs[name] - logs[name].mean() for name in varying]
    return np.stack([np.ones(len(gaps)), *centred], axis=1), varying


def judge(every: list[Gaps], draws: int = 999, margin: float = MARGIN) -> list[Change]:
    """The rule, over all variants at once; factors that do not vary in a variant's pairs are left out."""
    found = []
    for gaps in every:
        matrix, names = columns(gaps)
        fitted = regress(matrix, gaps.gap, gaps.block)
        for factor in ASKED:
            if factor in names:
                index = 1 + names.index(factor)
                shuffled = permutation_p(matrix, gaps.gap, gaps.block, index, draws)
                found.append(_test(gaps, fitted, index, factor, shuffled, margin))
    differences = holm([max(t.p_robust, t.p_permutation) for t in found])
    equivalences = holm([t.p_equivalence for t in found])
    return [_decide(*case, margin) for case in zip(found, differences, equivalences, strict=True)]


def mean_gap(gaps: Gaps) -> tuple[float, float, float, float]:
    """The advantage in the middle of the sweep, its standard error and its 95 % interval, in ln of the loss."""
    fitted = regress(np.ones((len(gaps), 1)), gaps.gap, gaps.block)
    half = stats.t.ppf(0.975, fitted.degrees) * fitted.standard_errors[0]
    mean = float(fitted.values[0])
    return mean, float(fitted.standard_errors[0]), mean - half, mean + half


def gain_slope(gaps: Gaps) -> dict[str, tuple[float, float]]:
    """ln of the compute-equivalent gain: its mean and its slope in ln of each factor, with standard errors."""
    kept = np.isfinite(gaps.log_gain)
    matrix, names = columns(gaps)
    fitted = regress(matrix[kept], gaps.log_gain[kept], gaps.block[kept])
    pairs = zip(fitted.values, fitted.standard_errors, strict=True)
    return dict(zip(["mean", *names], ((float(v), float(e)) for v, e in pairs), strict=True))


def crossing_flops(gaps: Gaps, change: Change) -> float | None:
    """The compute at which the advantage is predicted to vanish, at the sweep's mean depth; None unless it changes."""
    if change.factor != "flops" or change.answer not in ("grows", "shrinks"):
        return None
    matrix, names = columns(gaps)
    fitted = regress(matrix, gaps.gap, gaps.block)
    slope = fitted.values[1 + names.index("flops")]
    return float(np.exp(np.log(gaps.flops).mean() - fitted.values[0] / slope))


def _test(gaps: Gaps, fitted: Regression, index: int, factor: str, shuffled: float, margin: float) -> Change:
    values = getattr(gaps, factor)
    span = math.log(values.max() / values.min())
    change, error = float(fitted.values[index]) * span, float(fitted.standard_errors[index]) * span
    half = float(stats.t.ppf(0.975, fitted.degrees)) * error
    return Change(
        gaps.variant, factor, change, error, change - half, change + half, float(values.min()), float(values.max()),
        p_difference=math.nan, p_robust=fitted.p_value(index), p_permutation=shuffled,
        p_equivalence=equivalence_p(change, error, fitted.degrees, margin), answer="undecided",
        pairs=len(np.unique(gaps.block)), more_pairs=0,
    )  # fmt: skip


def _decide(test: Change, difference: float, equivalence: float, margin: float) -> Change:
    more = 0
    if equivalence < LEVEL:
        answer: Answer = "equivalent"
    elif difference < LEVEL:
        answer = "grows" if test.change > 0 else "shrinks"
    else:
        answer, more = "undecided", pairs_needed(test.standard_error, test.pairs, margin) - test.pairs
    replaced = {"p_difference": difference, "p_equivalence": equivalence, "answer": answer, "more_pairs": max(1, more)}
    return Change(**{**test.__dict__, **replaced, **({} if answer == "undecided" else {"more_pairs": 0})})


def pairs_needed(standard_error: float, pairs: int, margin: float = MARGIN) -> int:
    """Pairs after which a change as large as the margin is seen with power 0.8, errors falling as 1 / sqrt(pairs)."""
    return math.ceil(pairs * (standard_error * detectable(1.0) / margin) ** 2)


def detectable(standard_error: float, degrees: float = math.inf) -> float:
    """The smallest effect that is seen with power 0.8 at level 0.05, two-sided, at this standard error."""
    return standard_error * float(stats.t.ppf((1 - LEVEL / 2, POWER), degrees).sum())
