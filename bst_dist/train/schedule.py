"""The learning rate as a pure function of the step.

There is no scheduler object and no scheduler state. The trainer computes the factor of each step before it takes it, so
a resumed run has the same rates as an uninterrupted one.

Sources: warm-up, stable, decay (WSD): Hu et al., MiniCPM, arXiv 2404.06395; the ``1-sqrt`` decay: Hägele et al.,
arXiv 2405.18392; cosine: Loshchilov and Hutter, arXiv 1608.03983, eq. 5, without restarts.
"""

from __future__ import annotations

import math

from bst_dist.train.config import ScheduleConfig


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Return the factor on every group's peak rate for `step` (counted from 0) of a run of `steps` steps.

    It rises to 1 at the end of the warm-up. It reaches `final_fraction` just after the last step, so that no step has
    a rate of 0 when the final fraction is 0.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        fall = 0.5 - 0.5 * math.cos(math.pi * _progress(step, schedule.warmup_steps, steps))
    else:
        progress = _progress(step, _decay_start(schedule, steps), steps)
        fall = math.sqrt(progress) if schedule.decay_shape == "1-sqrt" else progress
    return 1.0 - (1.0 - schedule.final_fraction) * fall


def constant_until(schedule: ScheduleConfig, steps: int) -> int | None:
    """Return the number of steps before the decay begins; None when no decay follows a constant part.

    A run of `steps` steps can be trained for longer from a checkpoint of at most that many steps.
    """
    start = _decay_start(schedule, steps)
    return start if schedule.kind == "wsd" and start < steps else None


def _decay_start(schedule: ScheduleConfig, steps: int) -> int:
    return max(schedule.warmup_steps, steps - round(schedule.decay_fraction * steps))


def _progress(step: int, start: int, end: int) -> float:
    """Return the fraction of the steps from `start` to `end` that are done before `step`, clipped to [0, 1]."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
