"""Learning rate as a pure function of the step.

No scheduler object and no scheduler state: the trainer asks for the factor of the step it is about to take, so a
resumed run cannot disagree with the uninterrupted one.

Sources: warm-up, stable, decay (WSD): Hu et al., MiniCPM, arXiv 2404.06395; the ``1-sqrt`` decay: Hägele et al.,
arXiv 2405.18392; cosine: Loshchilov and Hutter, arXiv 1608.03983, eq. 5, without restarts.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from bst_base.settings import Config


class ScheduleConfig(Config):
    kind: Literal["wsd", "cosine"] = "wsd"
    """wsd: constant after the warm-up, then a decay over the last steps, so that runs of several lengths can branch off
    one constant part; cosine: half a period from the end of the warm-up to the last step."""
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the rate rises linearly from 0; step 0 already moves."""
    decay_fraction: float = Field(0.2, ge=0, le=1)
    """Share of all steps that wsd's decay takes."""
    decay_shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    """How wsd's decay falls."""
    final_fraction: float = Field(0.0, ge=0, le=1)
    """Rate at the last step as a fraction of the peak."""


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor on every group's peak rate for `step` (counted from 0) of a run of `steps`.

    Rises to 1 at the end of the warm-up and reaches `final_fraction` just after the last step, so that no step of a
    run whose final fraction is 0 is wasted on a rate of 0.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        fall = 0.5 - 0.5 * math.cos(math.pi * _progress(step, schedule.warmup_steps, steps))
    else:
        start = max(schedule.warmup_steps, steps - round(schedule.decay_fraction * steps))
        progress = _progress(step, start, steps)
        fall = math.sqrt(progress) if schedule.decay_shape == "1-sqrt" else progress
    return 1.0 - (1.0 - schedule.final_fraction) * fall


def _progress(step: int, start: int, end: int) -> float:
    """Share of the steps from `start` to `end` that lie behind `step`, within 0 and 1."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
