"""Decide by `RULE`, which was fixed before the data, whether the advantage grows or shrinks with depth and compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from bst_dist.study.laws.gap import Gaps
from bst_dist.study.laws.regression import CoefficientTest, RegressionError, clustered_mean, holm, regress
from bst_dist.study.statistics import Estimate

LEVEL, POWER, MARGIN = 0.05, 0.8, 0.005
MISMATCH = 0.02
"""The largest change of ln N_variant - ln N_baseline over the range of a factor that is not called confounded."""
RULE: tuple[str | tuple[str, ...], ...] = (
    "Decide whether the advantage grows or shrinks with depth and with compute, by a rule fixed before the data.",
    "For each variant, within one arm, the paired gap is regressed on the logarithms of compute, depth and tokens per "
    "parameter. Errors are clustered by pair of runs. The *change* is the coefficient per doubling of depth or per "
    "tenfold of compute, as a share of the loss. The p values are adjusted by Holm over all variants and both factors. "
    f"At level {LEVEL:g} the answer is the first that holds:",
    (
        "confounded: the models of a pair differ in size, and this difference changes by more than "
        f"{100 * MISMATCH:g} % of N over the range of the factor.",
        f"equivalent: both one-sided tests reject a change as large as the margin, {100 * MARGIN:g} % of the loss per "
        "doubling of depth or per tenfold of compute. A real change below the margin is equivalent too: it is too "
        "small to choose an architecture by.",
        "grows or shrinks: the change differs from 0 both in its t test and in a permutation test (the larger p "
        "counts).",
        "undecided: none of these. The report then gives the number of pairs needed to detect a change as large as the "
        "margin.",
    ),
    "A variant that cannot be tested, or of which no pair of runs has finished, is included in Holm's adjustment with "
    "p = 1, so that the adjustment of the others does not become weaker. So is a factor whose change rests on one pair "
    "of runs, as when of the largest depth only one pair has finished: its noise cannot be told from the change.",
)
"""The rule in words, as a report prints it: paragraphs, and the answers in the order in which they are tried."""
DRAWS = 999
FACTORS = ("flops", "depth", "tokens_per_parameter")
Answer = Literal["grows", "shrinks", "equivalent", "undecided", "confounded"]
ANSWERS: tuple[Answer, ...] = ("grows", "shrinks", "equivalent", "undecided", "confounded")


class Unit(NamedTuple):
    """The unit of a factor: its change is given per multiplication of the factor by `factor`."""

    name: str
    per: str
    factor: float


UNITS = {"flops": Unit("compute", "tenfold of compute", 10.0), "depth": Unit("depth", "doubling of depth", 2.0)}
"""The factors with a verdict. Tokens per parameter is only in the regression, so that compute does not absorb its
effect."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """How the advantage of one variant changes over one factor."""

    variant: str
    arm: str
    factor: str
    change: Estimate
    """In ln of the loss, per doubling of depth or tenfold of compute."""
    from_value: float
    to_value: float
    p_difference: float
    """The larger of the p values of the t test and the permutation test, adjusted by Holm."""
    p_robust: float
    p_permutation: float
    p_equivalence: float
    """Adjusted by Holm."""
    mismatch: float
    """Change of ln N_variant - ln N_baseline over the range of the factor."""
    answer: Answer
    pairs: int

    @property
    def unit(self) -> Unit:
        return UNITS[self.factor]


def columns(gaps: Gaps) -> tuple[np.ndarray, list[str]]:
    """Return columns (n, p), an intercept and the centred ln of each varying factor, and the factors' names."""
    logs = {name: np.log(getattr(gaps, name)) for name in FACTORS}
    varying = [name for name in FACTORS if np.ptp(logs[name]) > 0.05]
    centred = [logs[name] - logs[name].mean() for name in varying]
    return np.stack([np.ones(len(gaps)), *centred], axis=1), varying


class Case(NamedTuple):
    """The prepared test of one factor of one variant."""

    gaps: Gaps
    place: int
    """Index of the variant."""
    factor: str
    test: CoefficientTest
    per_unit: float
    mismatch: float


class Measured(NamedTuple):
    """Results of one test in many studies; every array is (studies,)."""

    change: np.ndarray
    error: np.ndarray
    p_robust: np.ndarray
    p_permutation: np.ndarray
    p_equivalence: np.ndarray
    """Before Holm's adjustment."""


class Outcome(NamedTuple):
    """Results of the rule for all tests; every array is (tests, studies)."""

    p_difference: np.ndarray
    p_equivalence: np.ndarray
    answer: np.ndarray
    """Indices into ANSWERS."""


class Rule:
    """The rule, prepared for a set of pairs. It is applied to their measured gaps and to gaps of simulated studies."""

    def __init__(self, every: Sequence[Gaps], draws: int = DRAWS, margin: float = MARGIN, absent: int = 0) -> None:
        """Prepare; `absent`: the number of planned variants that have no pair, and so are not in `every`."""
        self.margin = margin
        self.cases: list[Case] = []
        self.untested: dict[str, str] = {}
        """The reason for each variant that cannot be tested."""
        names = {name for gaps in every for name in columns(gaps)[1] if name in UNITS}
        self.tests = (len(every) + absent) * len(names)
        for place, gaps in enumerate(every):
            try:
                self._prepare(gaps, place, draws)
            except RegressionError as error:
                self.untested[gaps.variant] = str(error)

    def _prepare(self, gaps: Gaps, place: int, draws: int) -> None:
        """Add the cases of one variant, and say which of its factors cannot be tested."""
        matrix, varying = columns(gaps)
        alone = []
        for factor in (name for name in UNITS if name in varying):
            test = CoefficientTest(matrix, gaps.stratum, 1 + varying.index(factor), draws)
            if test.rests_on is not None:
                alone.append(f"the change over {UNITS[factor].name} rests on one pair of runs: {test.rests_on}")
                continue
            off = mismatch_over(gaps, factor)
            self.cases.append(Case(gaps, place, factor, test, np.log(UNITS[factor].factor), off))
        if alone:
            self.untested[gaps.variant] = "; ".join(alone)

    def measure(self, case: Case, targets: np.ndarray) -> Measured:
        """Run one test in many studies; `targets` (studies, n) are the gaps of the case's variant."""
        value, error = (x * case.per_unit for x in case.test.estimates(targets))
        return Measured(
            value,
            error,
            2 * tail(np.abs(value), error, case.test.degrees),
            case.test.permutation_p(targets),
            tail(self.margin - np.abs(value), error, case.test.degrees),
        )

    def decide(self, measured: Sequence[Measured]) -> Outcome:
        """Return the answers of many studies; `measured` holds one entry per case, in the order of `cases`."""
        studies, tests = len(measured[0].change), len(self.cases)
        missing = [np.ones(studies)] * (self.tests - tests)
        larger = [np.maximum(m.p_robust, m.p_permutation) for m in measured]
        p_difference = holm(np.array([*larger, *missing]))[:tests]
        p_equivalence = holm(np.array([*(m.p_equivalence for m in measured), *missing]))[:tests]
        change = np.array([m.change for m in measured])
        answer = np.full((tests, studies), ANSWERS.index("undecided"))
        answer[(p_difference < LEVEL) & (change > 0)] = ANSWERS.index("grows")
        answer[(p_difference < LEVEL) & (change < 0)] = ANSWERS.index("shrinks")
        answer[p_equivalence < LEVEL] = ANSWERS.index("equivalent")
        answer[[abs(case.mismatch) > MISMATCH for case in self.cases]] = ANSWERS.index("confounded")
        return Outcome(p_difference, p_equivalence, answer)


def judge(
    every: Sequence[Gaps], draws: int = DRAWS, margin: float = MARGIN, absent: int = 0
) -> tuple[list[Change], dict[str, str]]:
    """Apply the rule to all variants together. Return the changes, and for each variant that is not tested, or not
    over each factor, the reason.

    `absent`: the number of planned variants without a pair.
    """
    rule = Rule(every, draws, margin, absent)
    if not rule.cases:
        return [], rule.untested
    measured = [rule.measure(case, case.gaps.gap[None]) for case in rule.cases]
    found = rule.decide(measured)
    changes = [
        Change(
            variant=case.gaps.variant,
            arm=case.gaps.arm,
            factor=case.factor,
            change=Estimate(float(m.change[0]), float(m.error[0]), case.test.degrees),
            from_value=float(getattr(case.gaps, case.factor).min()),
            to_value=float(getattr(case.gaps, case.factor).max()),
            p_difference=float(found.p_difference[i, 0]),
            p_robust=float(m.p_robust[0]),
            p_permutation=float(m.p_permutation[0]),
            p_equivalence=float(found.p_equivalence[i, 0]),
            mismatch=case.mismatch,
            answer=ANSWERS[found.answer[i, 0]],
            pairs=case.gaps.pairs,
        )
        for i, (case, m) in enumerate(zip(rule.cases, measured, strict=True))
    ]
    return changes, rule.untested


def mismatch_over(gaps: Gaps, factor: str) -> float:
    """Return by how much ln N_variant - ln N_baseline changes from the smallest to the largest value of a factor."""
    matrix, names = columns(gaps)
    slopes = np.linalg.lstsq(matrix, gaps.mismatch, rcond=None)[0]
    return float(slopes[1 + names.index(factor)] * np.ptp(np.log(getattr(gaps, factor))))


def tail(value: np.ndarray, error: np.ndarray, degrees: float) -> np.ndarray:
    """Return P(T > value / error). With error 0 it is 0 for a positive value, 1 for a negative value, and 1/2 for 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return stats.t.sf(np.nan_to_num(value / error, nan=0.0), degrees)


def mean_gap(gaps: Gaps) -> Estimate:
    """Return the mean advantage over all pairs, in ln of the loss; one pair alone has no standard error."""
    return clustered_mean(gaps.gap, gaps.stratum)


def mean_gain(gaps: Gaps) -> Estimate:
    """Return the mean ln of the compute-equivalent gain over the gaps that have one; NaN if none has."""
    kept = gaps.take(np.isfinite(gaps.log_gain))
    return mean_gap(Gaps(**{**vars(kept), "gap": kept.log_gain})) if len(kept) else Estimate(float("nan"), None)


def interaction(gaps: Gaps) -> Estimate | None:
    """Return how much the change per doubling of depth varies per tenfold of compute; None if it is not determined."""
    matrix, names = columns(gaps)
    if not {"flops", "depth"} <= set(names):
        return None
    product = np.prod([matrix[:, 1 + names.index(name)] for name in ("flops", "depth")], axis=0)
    try:
        found = regress(np.column_stack((matrix, product)), gaps.gap, gaps.stratum)
    except RegressionError:
        return None
    weights = np.zeros(matrix.shape[1] + 1)
    weights[-1] = np.log(10) * np.log(2)
    estimate = found.estimate(weights)
    return None if estimate.standard_error is None else estimate


class Crossing(NamedTuple):
    """The compute at which the advantage is zero, at the mean depth of the sweep, with its 95 % interval (Fieller)."""

    flops: float
    low: float
    high: float


def crossing(gaps: Gaps) -> Crossing | None:
    """Return the crossing; None unless its interval is bounded, that is, unless the slope in compute differs from 0."""
    matrix, names = columns(gaps)
    if "flops" not in names:
        return None
    place = 1 + names.index("flops")
    try:
        found = regress(matrix, gaps.gap, gaps.stratum)
    except RegressionError:
        return None
    if any(found.estimate(index).standard_error is None for index in (0, place)):
        return None
    a, b = found.values[0], found.values[place]
    t = stats.t.ppf(1 - LEVEL / 2, found.degrees) ** 2
    va, vab, vb = (found.covariance[i, j] for i, j in ((0, 0), (0, place), (place, place)))
    # (a + b x)^2 = t var(a + b x), a parabola in x
    square, linear, constant = b * b - t * vb, 2 * (a * b - t * vab), a * a - t * va
    if square <= 0 or linear**2 < 4 * square * constant:
        return None
    half = np.sqrt(linear**2 - 4 * square * constant)
    middle = np.log(gaps.flops).mean()
    return Crossing(
        *(float(np.exp(middle + x)) for x in (-a / b, (-linear - half) / 2 / square, (-linear + half) / 2 / square))
    )


def predict_gap(gaps: Gaps, at: Gaps) -> list[Estimate]:
    """Return the gaps that the regression on `gaps` predicts for `at`; errors include the scatter of single pairs."""
    matrix, names = columns(gaps)
    found = regress(matrix, gaps.gap, gaps.stratum)
    scatter = np.std(gaps.gap - matrix @ found.values, ddof=matrix.shape[1])
    centres = {name: np.log(getattr(gaps, name)).mean() for name in names}
    predicted = []
    for place in range(len(at)):
        weights = np.array([1.0, *(np.log(getattr(at, name)[place]) - centres[name] for name in names)])
        own = found.estimate(weights)
        error = None if own.standard_error is None else float(np.hypot(own.standard_error, scatter))
        predicted.append(own._replace(standard_error=error))
    return predicted


def contrast(gaps: Gaps, other: Gaps) -> dict[str, Estimate]:
    """Return how the advantage differs in another arm: its mean, and its change per unit of each factor both vary.

    A change that rests on one pair of runs in either arm is left out.
    """
    found = {"mean": _difference(mean_gap(gaps), mean_gap(other))}
    parts = []
    for one in (gaps, other):
        matrix, names = columns(one)
        try:
            fitted = regress(matrix, one.gap, one.stratum)
        except RegressionError:
            return found
        parts.append(
            {
                n: fitted.estimate(np.eye(len(names) + 1)[1 + names.index(n)] * np.log(UNITS[n].factor))
                for n in names
                if n in UNITS
            }
        )
    changes = {name: _difference(parts[0][name], parts[1][name]) for name in parts[0] if name in parts[1]}
    return found | {name: change for name, change in changes.items() if change.standard_error is not None}


def _difference(one: Estimate, other: Estimate) -> Estimate:
    """Return `other` minus `one`, for independent estimates."""
    if one.standard_error is None or other.standard_error is None:
        return Estimate(other.value - one.value, None)
    error = float(np.hypot(one.standard_error, other.standard_error))
    return Estimate(other.value - one.value, error, min(one.degrees, other.degrees))
