"""Whether a step is the one it should be.

The yardstick is one process in the same precision: with rounding alone to blame, a step on many ranks may be a few
times as far from double precision as that, and no more. A factor in front of a gradient is never mistaken for
rounding, because nothing may be off by a quarter, and half of a gradient is off by a half.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bst_dist.verify.reference import Step

TIMES = 4.0
"""How many times one process's error is allowed. Sums in another order, over as many terms, differ by less."""
FEW = 32
"""A gradient of fewer numbers is also measured by the same parameter of the other layers: its own error, one draw of so
few numbers, may be small by chance. A second draw of two numbers is over four times as large in 1 of 17 cases."""
NEVER = 0.25
"""The relative error that is never allowed."""
NEGLIGIBLE = 1e-6
"""Gradients this much smaller than the whole one count as this large: zero but for rounding has no direction."""


@dataclass(frozen=True)
class Yardstick:
    """The step in double precision, and how near to it one process comes in the precision of training."""

    exact: Step
    errors: dict[str, float]
    """By parameter: the relative error of its gradient, the largest of several ways to split the rows, and of all
    layers where it has fewer than FEW numbers."""
    whole: float
    """Of all gradients as one vector."""

    @classmethod
    def of(cls, exact: Step, rounded: Sequence[Step]) -> Yardstick:
        """The yardstick that several steps of one process give."""
        found = [parameter_errors(step, exact) for step in rounded]
        errors = {name: max(each[name] for each in found) for name in exact.gradients}
        return cls(exact, _of_all_layers(errors, exact), max(whole_error(step, exact) for step in rounded))

    def allowed(self, name: str) -> float:
        """The relative error that a parameter's gradient may have. A few numbers may be near the truth by luck, so
        the allowance is never less than that of the whole gradient."""
        return min(NEVER, TIMES * max(self.errors[name], self.whole))

    @property
    def allowed_whole(self) -> float:
        """The same of the loss, and of the global norm, which is off by no more than the whole gradient is."""
        return min(NEVER, TIMES * self.whole)


@dataclass(frozen=True)
class Finding:
    """How far a step on one rank is from the exact one."""

    loss_error: float
    norm_error: float
    parameter: str
    """The one nearest to what it is allowed, or furthest beyond."""
    error: float
    allowed: float
    allowed_whole: float
    scale: float
    """The factor that brings the exact gradient nearest to the whole gradient found; 1 when all is well."""
    rest: float
    """What is left of the relative error after that factor."""
    wrong: tuple[str, ...]
    """Every parameter beyond what it is allowed."""

    @property
    def passed(self) -> bool:
        """Whether loss, norm and every gradient are as they should be; what is not a number is not."""
        within = self.loss_error <= self.allowed_whole and self.norm_error <= self.allowed_whole
        return bool(within and not self.wrong)

    @property
    def severity(self) -> float:
        """The largest error in units of what it is allowed."""
        ratios = (self.error / self.allowed, self.loss_error / self.allowed_whole, self.norm_error / self.allowed_whole)
        return max(float("inf") if ratio != ratio else ratio for ratio in ratios)


def judge(step: Step, yardstick: Yardstick) -> Finding:
    """Compare one rank's step with the exact one."""
    exact = yardstick.exact
    errors = parameter_errors(step, exact)
    allowed = {name: yardstick.allowed(name) for name in errors}
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
        allowed_whole=yardstick.allowed_whole,
        scale=scale,
        rest=float((found - scale * wanted).norm() / wanted.norm()),
        wrong=wrong,
    )


def parameter_errors(step: Step, exact: Step) -> dict[str, float]:
    """Relative error of each parameter's gradient."""
    least = NEGLIGIBLE * exact.norm
    return {
        name: float((step.gradients[name] - wanted).norm() / max(float(wanted.norm()), least))
        for name, wanted in exact.gradients.items()
    }


def _of_all_layers(errors: Mapping[str, float], exact: Step) -> dict[str, float]:
    """The errors, of gradients of few numbers the largest that the parameter has in any layer."""
    largest: dict[str, float] = {}
    for name, error in errors.items():
        largest[_in_any_layer(name)] = max(error, largest.get(_in_any_layer(name), 0.0))
    few = {name for name, gradient in exact.gradients.items() if gradient.numel() < FEW}
    return {name: largest[_in_any_layer(name)] if name in few else error for name, error in errors.items()}


def _in_any_layer(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "", name)


def whole_error(step: Step, exact: Step) -> float:
    """Relative error of all gradients as one vector."""
    return float((_flat(step, exact) - _flat(exact, exact)).norm() / exact.norm)


def _flat(step: Step, like: Step) -> torch.Tensor:
    return torch.cat([step.gradients[name].flatten() for name in like.gradients])
