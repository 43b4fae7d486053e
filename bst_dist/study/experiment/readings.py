"""What the runs of an experiment gave, as estimates: over seeds where there are several, else over documents.

A difference is paired with the reference: by seed, both runs having read the same tokens in the same order, or by
document. With two or three seeds its interval is wide, and rightly so.
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
    """What one run gave for one column."""

    value: float
    documents: ByDocument | None = None
    """Where the value is a ratio over documents: its parts."""


def level(readings: Mapping[int, Reading]) -> Estimate:
    """The mean over seeds, keyed by seed; at least one."""
    if len(readings) > 1:
        return mean([reading.value for reading in readings.values()], "seeds")
    (reading,) = readings.values()
    return _over_documents(reading)


def difference(readings: Mapping[int, Reading], reference: Mapping[int, Reading]) -> Estimate | None:
    """An arm minus the reference, paired; None when they have no seed in common."""
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
    """Whether the 95 % interval of a difference over seeds leaves out zero.

    An interval over documents tells two trained models apart, and never the arms that they are one draw of.
    """
    return difference.over == "seeds" and not difference.low <= 0 <= difference.high


def _over_documents(reading: Reading) -> Estimate:
    return Estimate(reading.value, None) if reading.documents is None else ratio(*reading.documents)
