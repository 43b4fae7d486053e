"""Estimates with their uncertainty: means over runs, ratios over documents, and tests of equality.

Tokens of one document are not independent, so a standard error over tokens would be far too small. Therefore a loss is
a ratio of two sums over documents, with the error of the ratio estimator. Architectures are compared over runs with
different seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

Over = Literal["seeds", "documents"]
Equality = Literal["equal", "different", "undecided"]
LEVEL = 0.05
Z95 = 1.959963984540054
"""Number of standard deviations on either side of the mean that contain 95 % of a normal distribution."""
HUGE = 1e7
"""From this absolute value on a number is printed in scientific notation, as 3.2e+10."""


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    standard_error: float | None
    """None for a single observation, which has no spread."""
    degrees: float = math.inf
    """Degrees of freedom of Student's t for intervals. For a mean: observations - 1."""
    over: Over | None = None
    """What was sampled; None if it is clear from the context."""

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % interval; None without a standard error."""
        return None if self.standard_error is None else self.standard_error * quantile(1 - LEVEL / 2, self.degrees)

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval; minus infinity without a standard error."""
        return self.value - (math.inf if self.half_width is None else self.half_width)

    @property
    def high(self) -> float:
        return self.value + (math.inf if self.half_width is None else self.half_width)

    @property
    def observations(self) -> float:
        """Number of observations behind the standard error; 1 without one."""
        return 1 if self.standard_error is None else self.degrees + 1

    @property
    def p_value(self) -> float:
        """Two-sided p value of the hypothesis that the value is 0; 1 without a standard error."""
        if self.standard_error is None:
            return 1.0
        if not self.standard_error:
            return float(self.value == 0)
        return float(2 * stats.t.sf(abs(self.value) / self.standard_error, self.degrees))

    def report(self, name: str) -> dict[str, float | None]:
        """Return entries for a machine-readable report: `name` and `name`_standard_error."""
        return {name: self.value, f"{name}_standard_error": self.standard_error}

    def text(self, digits: int, sign: bool = False) -> str:
        """Return "value ± error" with `digits` decimals; with `sign`, a positive value has a plus sign."""
        value = readable(self.value, digits, sign)
        return value if self.standard_error is None else f"{value} ± {readable(self.standard_error, digits)}"

    def __str__(self) -> str:
        return self.text(4)


def readable(value: float, digits: int, sign: bool = False) -> str:
    """Format a number with `digits` decimals; huge numbers (a perplexity of random weights) in scientific notation."""
    return f"{value:{'+' if sign else ''}{f',.{digits}f' if abs(value) < HUGE else '.1e'}}"


def entries(found: Any) -> Any:
    """Convert a dataclass, also inside lists and dicts, to a dictionary for a machine-readable report.

    The keys are the names of the fields. An estimate becomes two entries (`Estimate.report`). Fields that are None or
    NaN are left out.
    """
    if isinstance(found, dict):
        return {key: entries(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [entries(value) for value in found]
    if not is_dataclass(found):
        return found
    report = {}
    for name in (field.name for field in fields(found)):
        value = getattr(found, name)
        if isinstance(value, Estimate):
            report |= value.report(name)
        elif value is not None and value == value:
            report[name] = entries(value)
    return report


def mean(values: Sequence[float] | np.ndarray, over: Over | None = None) -> Estimate:
    """Return the mean of independent observations and its standard error, which is None for a single observation."""
    n = len(values)
    if n < 2:
        return Estimate(float(np.mean(values)), None)
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n), n - 1, over)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """Return the ratio of two sums over n sampled documents, with its standard error by the delta method.

    ``R = sum a / sum b``; ``Var R = n / (n - 1) sum (a - R b)^2 / (sum b)^2`` (Cochran, Sampling Techniques, 1977,
    chapter 6, without a finite-population correction, because the documents are a sample of all possible documents).

    Args:
        numerator: (n,) a of each document.
        denominator: (n,) b of each document. The sum must be positive.
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    value = a.sum() / b.sum()
    n = len(a)
    if n < 2:
        return Estimate(float(value), None)
    variance = n / (n - 1) * np.square(a - value * b).sum() / b.sum() ** 2
    return Estimate(float(value), math.sqrt(variance), n - 1, "documents")


def wilson(share: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a share of n independent observations, by default 95 %.

    Unlike value ± z errors it is valid near 0 and 1.
    """
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def share_interval(share: Estimate) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share from `ratio`.

    n is the number of independent observations with the same standard error (Kish's effective sample size). Without an
    error, as when every row is right or every one wrong, each row counts as one observation.
    """
    n = float(share.observations or 1)
    if share.standard_error:
        n = share.value * (1 - share.value) / share.standard_error**2
    low, high = wilson(share.value, n)
    return max(0.0, low), min(1.0, high)


def share_text(share: Estimate) -> str:
    """Return "value ± error"; if the error is 0 or unknown, the value with its interval."""
    if share.standard_error:
        return str(share)
    low, high = share_interval(share)
    return f"{share.value:.4f} ({low:.4f} to {high:.4f})"


def share_report(share: Estimate, name: str) -> dict[str, float | None]:
    """Return entries for a machine-readable report: those of `Estimate.report`, and the ends of the interval."""
    low, high = share_interval(share)
    return {**share.report(name), f"{name}_low_95": low, f"{name}_high_95": high}


def exponential(log: Estimate) -> Estimate:
    """Return ``exp`` of an estimate (a perplexity from nats), with its error by the delta method."""
    try:
        value = math.exp(log.value)
    except OverflowError:
        value = math.inf
    return log._replace(value=value, standard_error=None if log.standard_error is None else value * log.standard_error)


def equality(difference: Estimate, margin: float) -> Equality:
    """Return whether a difference is shown to be below the margin ("equal"), shown to be nonzero, or neither.

    "equal": both one-sided t tests reject a difference as large as the margin (Schuirmann 1987). A test that merely
    does not reject equality is no evidence for equality.
    """
    if difference.standard_error is None:
        return "undecided"
    half = difference.standard_error * quantile(1 - LEVEL, difference.degrees)
    if abs(difference.value) + half < margin:
        return "equal"
    return "different" if difference.p_value < LEVEL else "undecided"


def quantile(share: float, degrees: float) -> float:
    """Return the quantile of Student's t distribution."""
    return float(stats.t.ppf(share, degrees))
