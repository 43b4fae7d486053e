"""Learning rate as a pure function of the step.

No scheduler object and no scheduler state: the trainer asks for the factor of the step it is about to take, so a
resumed run cannot disagree with the uninterrupted one.

Sources: warm-up, stable, decay (WSD): Hu et al., MiniCPM, arXiv 2404.06395; the ``1-sqrt`` decay: Hägele et al.,
arXiv 2405.18392; cosine: Loshchilov and Hutter, arXiv 1608.03983, eq. 5, without restarts.
"""

from __future__ import annotations

import math

from bst_dist.train.config import ScheduleConfig


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
        progress = _progress(step, _decay_start(schedule, steps), steps)
        fall = math.sqrt(progress) if schedule.decay_shape == "1-sqrt" else progress
    return 1.0 - (1.0 - schedule.final_fraction) * fall


def constant_until(schedule: ScheduleConfig, steps: int) -> int | None:
    """Steps that have been taken when the decay of a run of `steps` begins: from a checkpoint of at most so many it can
    be trained for longer. None where no decay follows a constant part."""
    start = _decay_start(schedule, steps)
    return start if schedule.kind == "wsd" and start < steps else None


def _decay_start(schedule: ScheduleConfig, steps: int) -> int:
    return max(schedule.warmup_steps, steps - round(schedule.decay_fraction * steps))


def _progress(step: int, start: int, end: int) -> float:
    """Share of the steps from `start` to `end` that lie behind `step`, within 0 and 1."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
