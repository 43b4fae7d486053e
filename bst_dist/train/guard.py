"""Stops a run whose loss or gradient is no number any more, before it reaches a checkpoint."""

from __future__ import annotations

import math

from data_pipeline.errors import UserError


class DivergedError(UserError):
    """The loss or the gradient became infinite or not a number."""


def require_finite(name: str, value: float, step: int, rate: float) -> None:
    """Raise DivergedError when `value` is not finite; every rank sees the same value and stops."""
    if not math.isfinite(value):
        raise DivergedError(
            f"the {name} is {value} in step {step} (learning rate {rate:.3g}): that step was not taken, and the last "
            "checkpoint is from before it; start a new run with a lower optimizer.learning_rate, a longer "
            "schedule.warmup_steps or a lower train.gradient_clipping"
        )
