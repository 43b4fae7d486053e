"""Predict the changes that the verdict's rule can detect in a sweep, by applying the rule to simulated studies.

The power of a plain t test would be far too optimistic: the rule adjusts for all variants and factors, and requires a
permutation test too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bst_dist.study.laws.gap import Gaps
from bst_dist.study.laws.verdict import ANSWERS, MARGIN, MISMATCH, POWER, Measured, Rule, tail

STUDIES = 400
MANY_PAIRS = 48
"""From this number of pairs on, errors and detectable changes are proportional to 1 / sqrt(pairs)."""


@dataclass(frozen=True)
class Noise:
    """The noise of ln of the loss between runs that differ only in their seed."""

    seed: float
    """Standard deviation."""
    within: float
    """Share of the variance that is independent between points of one run."""


@dataclass(frozen=True)
class Power:
    """The expected verdict about one variant over one factor."""

    factor: str
    pairs: int
    standard_error: float
    """Standard error of the change, in ln of the loss per doubling of depth or tenfold of compute."""
    power_at_margin: float
    """Probability of the answer "grows" for a true change as large as the margin."""
    minimum_detectable_change: float
    """Smallest true change with a probability of 0.8 of the answer "grows"; infinite if none was found."""
    equivalent: float
    """Probability of the answer "equivalent" for a true change of zero."""
    false_positive_rate: float
    """Probability of at least one answer "grows" or "shrinks", over all variants and factors, when nothing changes."""


class Simulation:
    """Many simulated studies with the pairs of one design, each with its own noise."""

    def __init__(
        self,
        every: Sequence[Gaps],
        noise: Noise,
        studies: int = STUDIES,
        seed: int = 0,
        margin: float = MARGIN,
        absent: int = 0,
    ) -> None:
        self.every, self.studies = list(every), studies
        self.rule = Rule(every, margin=margin, absent=absent)
        generator = np.random.default_rng(seed)
        base: dict[tuple[str, float], np.ndarray] = {}
        level: dict[str, np.ndarray] = {}
        common, own = noise.seed * math.sqrt(1 - noise.within), noise.seed * math.sqrt(noise.within)
        self.noise = []
        for gaps in self.every:
            mine: dict[str, np.ndarray] = {}
            columns = []
            for stratum, length in zip(gaps.stratum, gaps.tokens_per_parameter, strict=True):
                key = (str(stratum), round(math.log(length), 1))
                # All variants of a stratum are compared with the same run of the baseline, so they share its noise.
                if stratum not in level:
                    level[stratum] = generator.normal(0, common, studies)
                if key not in base:
                    base[key] = level[stratum] + generator.normal(0, own, studies)
                if stratum not in mine:
                    mine[stratum] = generator.normal(0, common, studies)
                columns.append(base[key] - mine[stratum] - generator.normal(0, own, studies))
            self.noise.append(np.stack(columns, axis=1))

        self.null_measurements = [self.rule.measure(case, self.noise[case.place]) for case in self.rule.cases]

    def answers(self, test: int | None = None, change: float = 0.0) -> np.ndarray:
        """Return indices into ANSWERS (tests, studies), for a true change of `change` in `test`, or of 0 without it."""
        return self.rule.decide(self.null_measurements if test is None else self._measured(test, change)).answer

    def detection_rate(self, test: int, change: float) -> float:
        """Return the probability of the answer "grows" for a true change of `change`."""
        return float((self.answers(test, change)[test] == ANSWERS.index("grows")).mean())

    def false_positive_rate(self) -> float:
        """Return the probability of at least one answer "grows" or "shrinks" when nothing changes."""
        wrong = [ANSWERS.index("grows"), ANSWERS.index("shrinks")]
        return float(np.isin(self.answers(), wrong).any(0).mean())

    def minimum_detectable_change(self, test: int) -> float:
        """Return the smallest change with power 0.8, found by t tests alone and raised until the whole rule agrees."""
        error = float(np.std(self.null_measurements[test].change))
        low, high = error, 40 * error
        while high / low > 1.02:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self._detection_rate_by_t(test, middle) >= POWER else (middle, high)
        for change in high * 1.08 ** np.arange(10):
            if self.detection_rate(test, change) >= POWER:
                return float(change)
        return math.inf

    def _measured(self, test: int, change: float) -> list[Measured]:
        case = self.rule.cases[test]
        per_unit = np.log(getattr(case.gaps, case.factor)) / case.per_unit
        targets = self.noise[case.place] + change * per_unit
        return [
            self.rule.measure(own, targets) if own.place == case.place else nothing
            for own, nothing in zip(self.rule.cases, self.null_measurements, strict=True)
        ]

    def _detection_rate_by_t(self, test: int, change: float) -> float:
        """Like `detection_rate`, but cheap: no permutation test; a change shifts the estimate, and its error stays."""
        own = self.null_measurements[test]
        value = own.change + change
        degrees = self.rule.cases[test].test.degrees
        robust = 2 * tail(np.abs(value), own.error, degrees)
        moved = own._replace(
            change=value,
            p_robust=robust,
            p_permutation=robust,
            p_equivalence=tail(self.rule.margin - np.abs(value), own.error, degrees),
        )
        answer = self.rule.decide([*self.null_measurements[:test], moved, *self.null_measurements[test + 1 :]]).answer
        return float((answer[test] == ANSWERS.index("grows")).mean())


def predict(every: Sequence[Gaps], noise: Noise, studies: int = STUDIES, margin: float = MARGIN) -> list[Power]:
    """Return the power for the first variant, over each factor. The other variants count in Holm's adjustment."""
    simulation = Simulation(every, noise, studies, margin=margin)
    nothing, wrong = simulation.answers(), simulation.false_positive_rate()
    return [
        Power(
            case.factor,
            every[0].pairs,
            float(np.std(simulation.null_measurements[test].change)),
            simulation.detection_rate(test, margin),
            simulation.minimum_detectable_change(test),
            float((nothing[test] == ANSWERS.index("equivalent")).mean()),
            wrong,
        )
        for test, case in enumerate(simulation.rule.cases)
        if case.place == 0
    ]


def detectable_in_standard_errors(every: Sequence[Gaps], absent: int = 0) -> dict[str, float]:
    """Return for each factor the smallest change detected with power 0.8, in standard errors of the change.

    The simulated studies have the same pairs, with the seeds repeated up to about MANY_PAIRS. Confounded variants,
    which never get the answer "grows", are left out; `absent` is that of `Rule`.
    """
    found: dict[str, float] = {}
    enlarged = [repeated(gaps, max(1, round(MANY_PAIRS / gaps.pairs))) for gaps in every]
    # With much noise, detected changes are far above the margin, so none of them is called equivalent.
    simulation = Simulation(enlarged, Noise(0.05, 0.3), studies=200, absent=absent)
    for test, case in enumerate(simulation.rule.cases):
        if case.factor not in found and abs(case.mismatch) <= MISMATCH:
            error = float(np.std(simulation.null_measurements[test].change))
            found[case.factor] = simulation.minimum_detectable_change(test) / error
    return found


def pairs_needed(pairs: int, standard_error: float, detectable: float, margin: float = MARGIN) -> int | None:
    """Return the number of pairs with which a change as large as the margin equals `detectable` standard errors.

    `standard_error` is the error of the change with `pairs` pairs. It is proportional to 1 / sqrt(pairs). None if
    `detectable` is infinite: no number of pairs would do.
    """
    if not math.isfinite(detectable):
        return None
    return math.ceil(pairs * (detectable * standard_error / margin) ** 2)


def repeated(gaps: Gaps, times: int) -> Gaps:
    """Return the same design with `times` times as many seeds."""
    arrays = {
        name: np.concatenate([value] * times) for name, value in vars(gaps).items() if isinstance(value, np.ndarray)
    }
    arrays["stratum"] = np.concatenate([np.char.add(gaps.stratum.astype(str), f" #{k}") for k in range(times)])
    return replace(gaps, **arrays)
