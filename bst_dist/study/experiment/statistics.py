"""Arms of an experiment with their uncertainty: over seeds where there are several, else over documents.

A difference is paired with the reference: by seed, both runs having read the same tokens in the same order, or by
document. Its interval is Student's; with two or three seeds that is wide, and rightly so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import t as student

from bst_dist.study.statistics import ratio

Over = Literal["seeds", "documents"]


class ByDocument(NamedTuple):
    """A loss by document: the value is sum(cost) / sum(size)."""

    cost: np.ndarray
    """(n,) bits."""
    size: np.ndarray
    """(n,) bytes."""


class Reading(NamedTuple):
    """What one run gave for one column."""

    value: float
    documents: ByDocument | None = None
    """Where the value is a ratio over documents: its parts."""


class Figure(NamedTuple):
    """An estimate in a table."""

    value: float
    standard_error: float | None
    """None where one observation says nothing about the spread."""
    over: Over | None
    """What it is a standard error over; None without one."""
    n: int
    """Seeds, or documents."""

    @property
    def interval(self) -> float | None:
        """Half the 95 % interval, Student's with n - 1 degrees of freedom."""
        if self.standard_error is None:
            return None
        return float(student.ppf(0.975, self.n - 1)) * self.standard_error

    @property
    def apart(self) -> bool:
        """Of a difference: whether its 95 % interval over seeds leaves out zero.

        An interval over documents tells two trained models apart, and never the arms that they are one draw of.
        """
        return self.over == "seeds" and self.interval is not None and abs(self.value) > self.interval


def level(readings: Mapping[int, Reading]) -> Figure:
    """The mean over seeds, keyed by seed; at least one."""
    if len(readings) > 1:
        return _over_seeds([reading.value for reading in readings.values()])
    (reading,) = readings.values()
    return _over_documents(reading)


def difference(readings: Mapping[int, Reading], reference: Mapping[int, Reading]) -> Figure | None:
    """An arm minus the reference, paired; None when they have no seed in common."""
    shared = [seed for seed in readings if seed in reference]
    if not shared:
        return None
    if len(shared) > 1:
        return _over_seeds([readings[seed].value - reference[seed].value for seed in shared])
    own, other = readings[shared[0]], reference[shared[0]]
    a, b = own.documents, other.documents
    paired = None
    if a is not None and b is not None and np.array_equal(a.size, b.size):
        paired = ByDocument(a.cost - b.cost, a.size)
    return _over_documents(Reading(own.value - other.value, paired))


def _over_seeds(values: list[float]) -> Figure:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Figure(float(np.mean(values)), error, "seeds", len(values))


def _over_documents(reading: Reading) -> Figure:
    if reading.documents is None or len(reading.documents.size) < 2:
        return Figure(reading.value, None, None, 1)
    estimate = ratio(*reading.documents)
    return Figure(estimate.value, estimate.standard_error, "documents", len(reading.documents.size))
