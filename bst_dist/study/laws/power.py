"""What the verdict's rule will be able to detect in a sweep: the rule itself, applied to simulated studies.

A plain t test would promise far more power: the rule adjusts for all variants and factors, and needs a permutation test
too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bst_dist.study.laws.gap import Gaps
from bst_dist.study.laws.verdict import ANSWERS, MARGIN, POWER, Measured, Rule, tail

STUDIES = 400
MANY_PAIRS = 48
"""With more pairs than these, errors and detectable changes fall as one over the root of the pairs."""


@dataclass(frozen=True)
class Noise:
    """Of ln of the loss, between runs that differ only in their seed."""

    seed: float
    """Standard deviation."""
    within: float
    """Share of the variance that points of one run do not share."""


@dataclass(frozen=True)
class Power:
    """What to expect of the verdict about one variant over one factor."""

    factor: str
    pairs: int
    standard_error: float
    """Of the change, in ln of the loss per doubling of depth or tenfold of compute."""
    at_margin: float
    """The chance that a true change as large as the margin is called grown."""
    smallest_seen: float
    """The smallest true change that is called grown with power 0.8; infinite where none is."""
    equivalent: float
    """The chance that no change at all is called equivalent."""
    false: float
    """The chance that anything is called grown or shrunk, of any variant, when nothing changes."""


class Simulation:
    """Many studies with the pairs of one design, each with its own noise."""

    def __init__(self, every: Sequence[Gaps], noise: Noise, studies: int = STUDIES, seed: int = 0,
                 margin: float = MARGIN) -> None:  # fmt: skip
        self.every, self.studies = list(every), studies
        self.rule = Rule(every, margin=margin)
        generator = np.random.default_rng(seed)
        base: dict[tuple[str, float], np.ndarray] = {}
        level: dict[str, np.ndarray] = {}
        common, own = noise.seed * math.sqrt(1 - noise.within), noise.seed * math.sqrt(noise.within)
        self.noise = []
        for gaps in self.every:
            mine: dict[str, np.ndarray] = {}
            columns_ = []
            for block, length in zip(gaps.block, gaps.tokens_per_parameter, strict=True):
                key = (str(block), round(math.log(length), 1))
                # The baseline's run is one and the same for all variants.
                if block not in level:
                    level[block] = generator.normal(0, common, studies)
                if key not in base:
                    base[key] = level[block] + generator.normal(0, own, studies)
                if block not in mine:
                    mine[block] = generator.normal(0, common, studies)
                columns_.append(base[key] - mine[block] - generator.normal(0, own, studies))
            self.noise.append(np.stack(columns_, axis=1))

        self.nothing = [self.rule.measure(case, self.noise[case.place]) for case in self.rule.cases]

    def answers(self, test: int | None = None, change: float = 0.0) -> np.ndarray:
        """(tests, studies) places in ANSWERS, when the test's variant changes by `change` per unit of its factor."""
        return self.rule.decide(self.nothing if test is None else self._measured(test, change)).answer

    def seen(self, test: int, change: float) -> float:
        """The chance that this change is called grown."""
        return float((self.answers(test, change)[test] == ANSWERS.index("grows")).mean())

    def false(self) -> float:
        """The chance of a verdict grows or shrinks although nothing changes."""
        wrong = [ANSWERS.index("grows"), ANSWERS.index("shrinks")]
        return float(np.isin(self.answers(), wrong).any(0).mean())

    def smallest_seen(self, test: int) -> float:
        """The smallest change called grown with power 0.8: first by the t tests alone, then by the whole rule."""
        error = float(np.std(self.nothing[test].change))
        low, high = error, 40 * error
        while high / low > 1.02:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self._seen_by_t(test, middle) >= POWER else (middle, high)
        for change in high * 1.08 ** np.arange(10):
            if self.seen(test, change) >= POWER:
                return float(change)
        return math.inf

    def _measured(self, test: int, change: float) -> list[Measured]:
        case = self.rule.cases[test]
        per_unit = np.log(getattr(case.gaps, case.factor)) / case.per_unit
        targets = self.noise[case.place] + change * per_unit
        return [self.rule.measure(own, targets) if own.place == case.place else nothing
                for own, nothing in zip(self.rule.cases, self.nothing, strict=True)]  # fmt: skip

    def _seen_by_t(self, test: int, change: float) -> float:
        """As `seen`, without the permutation test: a change moves the estimate and leaves its error as it is."""
        own = self.nothing[test]
        value = own.change + change
        degrees = self.rule.cases[test].test.degrees
        robust = 2 * tail(np.abs(value), own.error, degrees)
        moved = own._replace(change=value, p_robust=robust, p_permutation=robust,
                             p_equivalence=tail(self.rule.margin - np.abs(value), own.error, degrees))  # fmt: skip
        answer = self.rule.decide([*self.nothing[:test], moved, *self.nothing[test + 1 :]]).answer
        return float((answer[test] == ANSWERS.index("grows")).mean())


def predict(every: Sequence[Gaps], noise: Noise, studies: int = STUDIES, margin: float = MARGIN) -> list[Power]:
    """What the rule would see in the first variant, over each factor; the others are tested beside it."""
    simulation = Simulation(every, noise, studies, margin=margin)
    nothing, false = simulation.answers(), simulation.false()
    return [
        Power(
            case.factor, every[0].pairs, float(np.std(simulation.nothing[test].change)), simulation.seen(test, margin),
            simulation.smallest_seen(test), float((nothing[test] == ANSWERS.index("equivalent")).mean()), false,
        )
        for test, case in enumerate(simulation.rule.cases) if case.place == 0
    ]  # fmt: skip


def visible(every: Sequence[Gaps], studies: int = 200) -> dict[str, float]:
    """By factor: the smallest change that the rule sees with power 0.8, in standard errors of the change.

    Simulated are studies like these with seeds enough for MANY_PAIRS.
    """
    found: dict[str, float] = {}
    enlarged = [repeated(gaps, max(1, round(MANY_PAIRS / gaps.pairs))) for gaps in every]
    # With much noise what is seen lies far above the margin, where no change is called equivalent.
    simulation = Simulation(enlarged, Noise(0.05, 0.3), studies)
    for test, case in enumerate(simulation.rule.cases):
        if case.factor not in found:
            found[case.factor] = simulation.smallest_seen(test) / float(np.std(simulation.nothing[test].change))
    return found


def pairs_needed(pairs: int, standard_error: float, errors: float, margin: float = MARGIN) -> int:
    """Pairs like these after which a change as large as the margin is `errors` standard errors large.

    `standard_error`: of the change, with `pairs` pairs; it falls as one over the root of the pairs.
    """
    return math.ceil(pairs * (errors * standard_error / margin) ** 2)


def repeated(gaps: Gaps, times: int) -> Gaps:
    """The same design with so many times the seeds."""
    arrays = {name: np.concatenate([value] * times) for name, value in vars(gaps).items()
              if isinstance(value, np.ndarray)}  # fmt: skip
    arrays["block"] = np.concatenate([np.char.add(gaps.block.astype(str), f" #{k}") for k in range(times)])
    return replace(gaps, **arrays)
