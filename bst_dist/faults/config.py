"""The sections `guard` and `watchdog` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bst_base.settings import Config


class GuardConfig(Config):
    non_finite: Literal["stop", "skip", "roll-back"] = "stop"
    """When the loss or the gradient is infinite or not a number: end the run; skip the step, with its data; or go on
    from the last checkpoint and pass over the data from there to this step."""
    spike: Literal["ignore", "stop", "skip", "roll-back"] = "ignore"
    """When the loss jumps; as above."""
    spike_deviations: float = Field(10.0, gt=0)
    """How far above the median of the steps before a loss is a spike, in standard deviations of theirs (estimated from
    the median absolute deviation)."""
    spike_window: int = Field(128, ge=8)
    """Steps before, that this median is taken over; until there are so many, no spike is seen."""
    most: int = Field(3, ge=0)
    """How many steps may be skipped or rolled back from, within..."""
    within: int = Field(1000, ge=1)
    """... so many steps' worth of data; the next one ends the run."""


class WatchdogConfig(Config):
    limit_s: float = Field(900.0, ge=0)
    """Seconds that a rank may stay in one phase of a step without talking to the others: the first step compiles, and a
    checkpoint that is not written in the background is one phase. Beyond, the job is ended with status 70 and the rank
    that holds it up is named; 0: no watchdog."""
