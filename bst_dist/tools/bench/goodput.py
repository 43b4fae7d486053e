"""Which share of a cluster's time trains, by a model of failures and checkpoints.

Failures come at random with a mean time between them (a Poisson process). A checkpoint is taken after every `interval`
of training and makes training wait for `cost`. A failure loses what was trained since the last checkpoint, and then
`recovery` passes until the next step. The share of time that trains for good is then

    interval / (exp((interval + cost) / mean) - 1) / (mean + recovery)

because of the intervals that begin, a share of exp(-(interval + cost) / mean) comes to its end. No failure is assumed
to strike during a recovery. It is the model of J. T. Daly, Future Generation Computer Systems 22 (2006), for the time
between two failures instead of a whole job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MeanTime:
    """How often a job of so many accelerators fails, as somebody has measured or projected."""

    accelerators: int
    hours: float
    source: str


META = "Kokolis et al., Revisiting Reliability in Large-Scale Machine Learning Research Clusters, arXiv 2410.21680"
MEAN_TIMES = (MeanTime(1024, 7.9, META), MeanTime(16384, 1.8, META + " (projected)"))
ANCHORS = (
    "FlashRecovery, arXiv 2509.03047: training continues within 150 s on 4,800 devices",
    "ByteRobust, arXiv 2509.16293: 97 % of the time trains, in a job of three months on 9,600 GPUs",
)
"""What others report, of their own systems and clusters."""


def goodput(mean_s: float, recovery_s: float, interval_s: float, cost_s: float) -> float:
    """The share of time that trains for good, 0 to 1; all arguments in seconds, `mean_s` between failures."""
    return interval_s / math.expm1((interval_s + cost_s) / mean_s) / (mean_s + recovery_s)


def best_interval_s(mean_s: float, cost_s: float) -> float:
    """The time between checkpoints that loses least, to first order: sqrt(2 cost mean) (Young 1974)."""
    return math.sqrt(2 * cost_s * mean_s)
