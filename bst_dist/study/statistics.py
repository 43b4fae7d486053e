"""Estimates with their uncertainty, documents being what is sampled.

Tokens of one document are not independent, so a standard error over tokens would be far too small. Every figure here
is a ratio of two sums over documents (nats per token, bits per byte), and its error is that of the ratio estimator.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value and the standard error of its sampling over documents."""

    value: float
    standard_error: float | None
    """None where one document alone says nothing about the spread."""

    def report(self, name: str) -> dict[str, float | None]:
        """As entries of a machine-readable report: `name` and `name`_standard_error."""
        return {name: self.value, f"{name}_standard_error": self.standard_error}

    def text(self, digits: int, sign: bool = False) -> str:
        """The value with so many decimals, and with `sign` a plus where it is positive, and its error."""
        value = f"{self.value:{'+' if sign else ''}.{digits}f}"
        return value if self.standard_error is None else f"{value} ± {self.standard_error:.{digits}f}"

    def __str__(self) -> str:
        return self.text(4)


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
    return Estimate(float(value), math.sqrt(variance))


def exponential(log: Estimate) -> Estimate:
    """``exp`` of an estimate, its error by the delta method: a perplexity from nats."""
    try:
        value = math.exp(log.value)
    except OverflowError:
        value = math.inf
    return Estimate(value, None if log.standard_error is None else value * log.standard_error)
