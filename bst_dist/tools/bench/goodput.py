"""Goodput: the share of a cluster's time that makes lasting training progress, by a model of failures and checkpoints.

Failures are a Poisson process with a known mean time between failures. After every `interval` of training, training
waits `cost` for a checkpoint. A failure loses the training since the last checkpoint, and the next step begins
`recovery` later. The goodput is then

    interval / (exp((interval + cost) / mean) - 1) / (mean + recovery)

because an interval that begins is completed with probability exp(-(interval + cost) / mean). The model assumes that no
failure happens during a recovery. It is the model of J. T. Daly, Future Generation Computer Systems 22 (2006), applied
to the time between two failures instead of a whole job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MeanTime:
    """Mean time between failures of a job on that number of accelerators, as published (measured or projected)."""

    accelerators: int
    hours: float
    source: str


META = "Kokolis et al., Revisiting Reliability in Large-Scale Machine Learning Research Clusters, arXiv 2410.21680"
MEAN_TIMES = (MeanTime(1024, 7.9, META), MeanTime(16384, 1.8, META + " (projected)"))
ANCHORS = (
    "FlashRecovery, arXiv 2509.03047: training continues within 150 s on 4,800 devices",
    "ByteRobust, arXiv 2509.16293: 97 % of the time trains, in a job of three months on 9,600 GPUs",
)
"""Published results of other systems, each on its own cluster."""


def goodput(mean_s: float, recovery_s: float, interval_s: float, cost_s: float) -> float:
    """Return the goodput, 0 to 1. `mean_s` is the mean time between failures; all arguments are in seconds."""
    return interval_s / math.expm1((interval_s + cost_s) / mean_s) / (mean_s + recovery_s)


def best_interval_s(mean_s: float, cost_s: float) -> float:
    """Return the time between checkpoints that loses least, to first order: sqrt(2 * cost * mean) (Young 1974)."""
    return math.sqrt(2 * cost_s * mean_s)
