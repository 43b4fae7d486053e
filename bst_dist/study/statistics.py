"""Estimates with their uncertainty: means over runs, ratios over documents, and what may be concluded from either.

Tokens of one document are not independent, so a standard error over tokens would be far too small: a loss is a ratio of
two sums over documents, and its error that of the ratio estimator. Runs that differ in their seed are what an
architecture is compared by.
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
HUGE = 1e7
"""From here on a number is printed by its power of ten, as 3.2e+10: nobody reads eleven digits."""


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    standard_error: float | None
    """None where one observation says nothing about the spread."""
    degrees: float = math.inf
    """Degrees of freedom of Student's t for intervals: of a mean, observations less one."""
    over: Over | None = None
    """What was sampled, where that is not plain."""

    @property
    def half_width(self) -> float | None:
        """Half the 95 % interval."""
        return None if self.standard_error is None else self.standard_error * quantile(1 - LEVEL / 2, self.degrees)

    @property
    def low(self) -> float:
        """Of the 95 % interval; minus infinity where there is no error."""
        return self.value - (math.inf if self.half_width is None else self.half_width)

    @property
    def high(self) -> float:
        return self.value + (math.inf if self.half_width is None else self.half_width)

    @property
    def observations(self) -> float:
        """How many the error is from; 1 without one."""
        return 1 if self.standard_error is None else self.degrees + 1

    @property
    def p_value(self) -> float:
        """Two-sided, of the value being 0; 1 without an error."""
        if self.standard_error is None:
            return 1.0
        if not self.standard_error:
            return float(self.value == 0)
        return float(2 * stats.t.sf(abs(self.value) / self.standard_error, self.degrees))

    def report(self, name: str) -> dict[str, float | None]:
        """As entries of a machine-readable report: `name` and `name`_standard_error."""
        return {name: self.value, f"{name}_standard_error": self.standard_error}

    def text(self, digits: int, sign: bool = False) -> str:
        """The value with so many decimals, and with `sign` a plus where it is positive, and its error."""
        value = readable(self.value, digits, sign)
        return value if self.standard_error is None else f"{value} ± {readable(self.standard_error, digits)}"

    def __str__(self) -> str:
        return self.text(4)


def readable(value: float, digits: int, sign: bool = False) -> str:
    """A number with so many decimals, or where it is huge, as a perplexity of random weights, by its power of ten."""
    return f"{value:{'+' if sign else ''}{f',.{digits}f' if abs(value) < HUGE else '.1e'}}"


def entries(found: Any) -> Any:
    """A dataclass as entries of a machine-readable report, under the names of its fields; in lists and dicts too.

    An estimate becomes two entries (`Estimate.report`). What is None or not a number is left out.
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
    """The mean of independent observations with the standard error that their spread says; one has none."""
    n = len(values)
    if n < 2:
        return Estimate(float(np.mean(values)), None)
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n), n - 1, over)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """The ratio of two sums over n sampled documents, with its standard error by the delta method.

    ``R = sum a / sum b``; ``Var R = n / (n - 1) sum (a - R b)^2 / (sum b)^2`` (Cochran, Sampling Techniques, 1977,
    chapter 6, without a finite-population correction: the documents stand for all that could have been drawn).

    Args:
        numerator: (n,) a of each document.
        denominator: (n,) b of each document; their sum must be positive.
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    value = a.sum() / b.sum()
    n = len(a)
    if n < 2:
        return Estimate(float(value), None)
    variance = n / (n - 1) * np.square(a - value * b).sum() / b.sum() ** 2
    return Estimate(float(value), math.sqrt(variance), n - 1, "documents")


def exponential(log: Estimate) -> Estimate:
    """``exp`` of an estimate, its error by the delta method: a perplexity from nats."""
    try:
        value = math.exp(log.value)
    except OverflowError:
        value = math.inf
    return log._replace(value=value, standard_error=None if log.standard_error is None else value * log.standard_error)


def equality(difference: Estimate, margin: float) -> Equality:
    """Whether a difference is shown to be smaller than the margin, shown not to be zero, or neither.

    Equal: both one-sided t tests reject a difference as large as the margin (Schuirmann 1987). That a test does not
    reject equality is no evidence for it.
    """
    if difference.standard_error is None:
        return "undecided"
    half = difference.standard_error * quantile(1 - LEVEL, difference.degrees)
    if abs(difference.value) + half < margin:
        return "equal"
    return "different" if difference.p_value < LEVEL else "undecided"


def quantile(share: float, degrees: float) -> float:
    """Of Student's t."""
    return float(stats.t.ppf(share, degrees))
