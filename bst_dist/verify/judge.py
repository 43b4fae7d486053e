"""Comparison of a step with the reference step.

The error limit comes from one process in the same precision. If rounding is the only difference, the error of a step on
many ranks, against double precision, is at most a few times as large as that of one process. A wrong factor in front of
a gradient is never mistaken for rounding: an error of a quarter is never allowed, and half a gradient has an error of a
half.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bst_dist.verify.reference import Step

TIMES = 4.0
"""Allowed multiple of one process's error. Sums of equally many terms in another order differ by less."""
FEW = 32
"""The limit of a gradient with fewer numbers than this also uses the same parameter of the other layers, because its
own error, one draw of so few numbers, may be small by chance. A second draw of two numbers is over four times as large
in 1 of 17 cases."""
NEVER = 0.25
"""Upper bound of every limit: a larger relative error is never allowed."""
NEGLIGIBLE = 1e-6
"""Lower bound of a gradient's norm in its relative error, as a fraction of the global norm: a gradient that is zero up
to rounding has no direction."""


@dataclass(frozen=True)
class ErrorLimits:
    """Limits of a step's errors, from the step in double precision and one process in the precision of training."""

    exact: Step
    errors: dict[str, float]
    """Relative error of each parameter's gradient: the largest for several ways to split the rows and, if it has fewer
    than FEW numbers, of all layers."""
    whole: float
    """Relative error of all gradients as one vector."""

    @classmethod
    def of(cls, exact: Step, rounded: Sequence[Step]) -> ErrorLimits:
        """Return the limits that follow from several steps of one process."""
        found = [parameter_errors(step, exact) for step in rounded]
        errors = {name: max(each[name] for each in found) for name in exact.gradients}
        return cls(exact, _of_all_layers(errors, exact), max(whole_error(step, exact) for step in rounded))

    def allowed(self, name: str) -> float:
        """Return the relative error allowed for a parameter's gradient. It is at least that of the whole gradient,
        because a few numbers may be accurate by chance."""
        return min(NEVER, TIMES * max(self.errors[name], self.whole))

    @property
    def allowed_whole(self) -> float:
        """The relative error allowed for the loss and the global norm. The norm's is at most the whole gradient's."""
        return min(NEVER, TIMES * self.whole)


@dataclass(frozen=True)
class Finding:
    """The errors of a step on one rank, relative to the exact step."""

    loss_error: float
    norm_error: float
    parameter: str
    """The parameter with the largest ratio of error to allowed error."""
    error: float
    allowed: float
    allowed_whole: float
    scale: float
    """The factor that brings the exact gradient nearest to the whole gradient found; 1 if the step is correct."""
    rest: float
    """The relative error that remains after that factor."""
    wrong: tuple[str, ...]
    """All parameters whose error is larger than allowed, or NaN."""

    @property
    def passed(self) -> bool:
        """Whether loss, norm and every gradient are within their limits; NaN is not."""
        within = self.loss_error <= self.allowed_whole and self.norm_error <= self.allowed_whole
        return bool(within and not self.wrong)

    @property
    def severity(self) -> float:
        """The largest ratio of error to allowed error."""
        ratios = (self.error / self.allowed, self.loss_error / self.allowed_whole, self.norm_error / self.allowed_whole)
        return max(float("inf") if ratio != ratio else ratio for ratio in ratios)


def judge(step: Step, limits: ErrorLimits) -> Finding:
    """Compare one rank's step with the exact one."""
    exact = limits.exact
    errors = parameter_errors(step, exact)
    allowed = {name: limits.allowed(name) for name in errors}
    wrong = tuple(name for name, error in errors.items() if not error <= allowed[name])
    worst = max(errors, key=lambda name: (name in wrong and errors[name] != errors[name], errors[name] / allowed[name]))
    found, wanted = _flat(step, exact), _flat(exact, exact)
    scale = float(found @ wanted / (wanted @ wanted))
    return Finding(
        loss_error=abs(step.loss / exact.loss - 1),
        norm_error=abs(step.norm / exact.norm - 1),
        parameter=worst,
        error=errors[worst],
        allowed=allowed[worst],
        allowed_whole=limits.allowed_whole,
        scale=scale,
        rest=float((found - scale * wanted).norm() / wanted.norm()),
        wrong=wrong,
    )


def parameter_errors(step: Step, exact: Step) -> dict[str, float]:
    """Return the relative error of each parameter's gradient."""
    least = NEGLIGIBLE * exact.norm
    return {
        name: float((step.gradients[name] - wanted).norm() / max(float(wanted.norm()), least))
        for name, wanted in exact.gradients.items()
    }


def _of_all_layers(errors: Mapping[str, float], exact: Step) -> dict[str, float]:
    """Return the errors; for gradients of few numbers, the largest error of the same parameter in any layer."""
    largest: dict[str, float] = {}
    for name, error in errors.items():
        largest[_in_any_layer(name)] = max(error, largest.get(_in_any_layer(name), 0.0))
    few = {name for name, gradient in exact.gradients.items() if gradient.numel() < FEW}
    return {name: largest[_in_any_layer(name)] if name in few else error for name, error in errors.items()}


def _in_any_layer(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "", name)


def whole_error(step: Step, exact: Step) -> float:
    """Return the relative error of all gradients as one vector."""
    return float((_flat(step, exact) - _flat(exact, exact)).norm() / exact.norm)


def _flat(step: Step, like: Step) -> torch.Tensor:
    return torch.cat([step.gradients[name].flatten() for name in like.gradients])
