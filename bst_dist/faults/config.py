"""The sections `guard` and `watchdog` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bst_base.settings import Config


class GuardConfig(Config):
    non_finite: Literal["stop", "skip", "roll-back"] = "stop"
    """What to do when the loss or the gradient is infinite or NaN. stop: end the run; skip: skip the step and its data;
    roll-back: reload the last scheduled checkpoint and skip the data from there to this step."""
    spike: Literal["ignore", "stop", "skip", "roll-back"] = "ignore"
    """What to do when the loss jumps: ignore, or one of the same actions."""
    spike_deviations: float = Field(10.0, gt=0, le=1e9, allow_inf_nan=False)
    """A loss is a spike when it is this many standard deviations (estimated from the median absolute deviation) above
    the median of the steps before it."""
    spike_window: int = Field(128, ge=8, le=2**20)
    """Number of steps that the median is taken over; before there are so many, no spike is detected."""
    most: int = Field(3, ge=0, le=2**40)
    """Skips and roll-backs allowed within `within` steps' worth of data; the next one ends the run."""
    within: int = Field(1000, ge=1, le=2**40)
    """Length of that window, in steps' worth of data."""


class WatchdogConfig(Config):
    limit_s: float = Field(480.0, ge=0, le=1e9, allow_inf_nan=False)
    """Seconds that a rank may spend in one phase of a step without communicating; after that the job ends with status
    70 and names the rank that blocks it. 0: no watchdog. Allow for compilation in the first step. A checkpoint may take
    longer: ranks that wait for one communicate as long as its files grow. NCCL and DeepSpeed would end a job after
    600 s without naming a rank; their limit follows this one."""

    @property
    def exchange_limit_s(self) -> float | None:
        """Timeout in seconds that torch gets for its collectives; None: torch's default.

        It is longer than the watchdog needs to end the job first: its limit, twice `watchdog.LONGEST_SILENCE_S`, and
        some seconds.
        """
        return 1.5 * self.limit_s + 120.0 if self.limit_s else None
