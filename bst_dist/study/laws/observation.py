"""Measured losses, and planned ones that are missing: the input of the law fits and of the verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.law import Points


@dataclass(frozen=True)
class Observation:
    """One planned loss, measured or not."""

    name: str
    architecture: str
    arm: str
    """Name of the settings under which the grid was run. A verdict uses the runs of one arm."""
    stratum: str
    """Arm, size, depth and seed: the two runs of a pair have the same stratum."""
    run: str
    """Observations of one run, or of a trunk and its branches, have the same value because they are not independent."""
    seed: int
    width: float
    depth: float
    parameters: float
    """N, training FLOPs per token / 6."""
    non_embedding: float
    """All parameters except those of embedding and head."""
    tokens: float
    length: float
    """Tokens per parameter, as planned."""
    flops: float
    time_s: float
    loss: float
    """Nats per token; NaN unless the run is done."""
    by_block: tuple[float, ...] = ()
    """The loss by position in the sequence, one value per block of W tokens; NaN for a block without valid tokens."""
    by_document: tuple[float, ...] = ()
    held_out: bool = False
    """Whether it is only predicted, neither fitted nor compared."""
    rate_factor: float = 1.0
    """The learning rate divided by the rate of the sweep's rule. Only the audit uses values other than 1."""
    step_time_excess: float = math.nan
    """Median step time / 10 % quantile of the step times - 1. It is large if other programs used the machine. NaN if
    unknown."""
    status: str = "done"
    """done, running, waiting, failed or diverged."""
    reason: str = ""
    """Why it failed or diverged."""
    corpora: str = ""
    """SHA-256 of the text that it was trained on; empty if unknown."""

    @property
    def usable(self) -> bool:
        """Whether the run is done and its loss is a number that has a logarithm."""
        return self.status == "done" and math.isfinite(self.loss) and self.loss > 0


def same_text(one: str, other: str) -> bool:
    """Whether two runs were trained on the same text, as far as it is known; of each run its `corpora`."""
    return not one or not other or one == other


def grid(observed: Sequence[Observation]) -> list[Observation]:
    """Return the observations that are fitted and compared: usable, not held out, at the rule's learning rate."""
    return [o for o in observed if o.usable and not o.held_out and o.rate_factor == 1]


def points(observed: Sequence[Observation], count: str = "parameters") -> Points:
    """Return the observations as points to fit; `count`, the source of N, is "parameters" or "non_embedding".

    Raises UserError if there are none.
    """
    if not observed:
        raise UserError("no run has finished: there is nothing to fit")

    def column(name: str) -> np.ndarray:
        return np.array([getattr(o, name) for o in observed])

    return Points(
        column("loss"),
        column(count),
        column("tokens"),
        column("width"),
        column("depth"),
        column("run"),
        column("architecture"),
    )
