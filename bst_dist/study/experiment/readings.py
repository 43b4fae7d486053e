"""Estimates from the runs of an experiment: over seeds if there are several, else over documents.

Differences from the reference are paired by seed (both runs have read the same tokens in the same order) or, with one
seed, by document. With only two or three seeds the interval is wide, as it should be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bst_dist.study.statistics import Estimate, mean, ratio


class ByDocument(NamedTuple):
    """A loss by document: the value is sum(cost) / sum(size)."""

    cost: np.ndarray
    """(n,) bits."""
    size: np.ndarray
    """(n,) bytes."""


class Reading(NamedTuple):
    """The value of one run in one column."""

    value: float
    documents: ByDocument | None = None
    """The parts of the value by document, if it is a ratio over documents."""


def level(readings: Mapping[int, Reading]) -> Estimate:
    """Return the mean over seeds. `readings` is seed -> value, with at least one seed."""
    if len(readings) > 1:
        return mean([reading.value for reading in readings.values()], "seeds")
    (reading,) = readings.values()
    return _over_documents(reading)


def difference(readings: Mapping[int, Reading], reference: Mapping[int, Reading]) -> Estimate | None:
    """Return the paired difference of an arm minus the reference; None if they have no seed in common."""
    shared = [seed for seed in readings if seed in reference]
    if not shared:
        return None
    if len(shared) > 1:
        return mean([readings[seed].value - reference[seed].value for seed in shared], "seeds")
    own, other = readings[shared[0]], reference[shared[0]]
    a, b = own.documents, other.documents
    paired = None
    if a is not None and b is not None and np.array_equal(a.size, b.size):
        paired = ByDocument(a.cost - b.cost, a.size)
    return _over_documents(Reading(own.value - other.value, paired))


def apart(difference: Estimate) -> bool:
    """Whether the 95 % interval of a difference over seeds excludes zero.

    False for an interval over documents: it compares two trained models, not the arms, of which each model is one draw.
    """
    return difference.over == "seeds" and not difference.low <= 0 <= difference.high


def _over_documents(reading: Reading) -> Estimate:
    return Estimate(reading.value, None) if reading.documents is None else ratio(*reading.documents)
