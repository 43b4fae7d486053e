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
            f"the {name} is {value} in step {step} (learning rate {rate:.3g}): the weights of the step before are "
            "unchanged and nothing was saved since; lower optimizer.learning_rate or train.gradient_clipping, "
            "lengthen schedule.warmup_steps, and go on from the last checkpoint with --resume in a new run"
        )
