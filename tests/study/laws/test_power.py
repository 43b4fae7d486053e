"""The predicted power of the verdict rule, compared with the rule applied to simulated studies."""

from __future__ import annotations

import numpy as np
import pytest

from bst_dist.study.laws import power, verdict
from bst_dist.study.laws.gap import Gaps

NOISE = power.Noise(0.006, 0.3)


def design(variants=1, seeds=2):
    places = [
        (6 * n * n * m, d, m, f"{n} {d} {k}")
        for n in (1e5, 2e5, 4e5)
        for d in (2, 8)
        for k in range(seeds)
        for m in (5.0, 20.0)
    ]
    flops, depth, length, stratum = (np.array(column) for column in zip(*places, strict=True))
    zero = np.zeros(len(places))
    return [
        Gaps(f"v{v}", "all", zero, zero, zero, flops, depth.astype(float), length, stratum) for v in range(variants)
    ]


def studies(every, noise, number, seed, change=0.0):
    """Return, for each variant, the gaps of `number` simulated studies, (number, n); each run has its own noise."""
    generator = np.random.default_rng(seed)
    strata, place = np.unique(every[0].stratum, return_inverse=True)
    losses = []
    for _ in range(len(every) + 1):
        level = generator.normal(0, noise.seed * np.sqrt(1 - noise.within), (number, len(strata)))
        losses.append(level[:, place] + generator.normal(0, noise.seed * np.sqrt(noise.within), (number, len(place))))
    gaps = [losses[0] - loss for loss in losses[1:]]
    gaps[0] = gaps[0] + change * np.log2(every[0].depth)
    return gaps


def answers(every, noise, number, seed, change=0.0):
    """Return the rule's answers for each simulated study: (tests, number)."""
    rule, gaps = verdict.Rule(every), studies(every, noise, number, seed, change)
    found = rule.decide([rule.measure(case, gaps[case.place]) for case in rule.cases]).answer
    return np.array(verdict.ANSWERS)[found]


def test_batched_verdicts_equal_single_verdicts():
    every = design(2)
    found = answers(every, NOISE, 12, 3, 0.012)
    drawn = studies(every, NOISE, 12, 3, 0.012)
    for place in range(12):
        own = [Gaps(**{**vars(g), "gap": y[place]}) for g, y in zip(every, drawn, strict=True)]
        assert [change.answer for change in verdict.judge(own)[0]] == found[:, place].tolist()


@pytest.mark.parametrize("variants", [1, 3])
def test_predicted_power_equals_the_simulated_power(variants):
    every = design(variants)
    change = 0.012
    promised = power.Simulation(every, NOISE, 1000, seed=1).detection_rate(1, change)
    seen = np.mean(answers(every, NOISE, 1000, 77, change)[1] == "grows")
    assert 0.2 < promised < 0.97
    assert abs(promised - seen) < 0.05, (promised, seen)


def test_power_with_several_variants_is_lower_than_that_of_a_t_test():
    every = design(6)
    simulation = power.Simulation(every, NOISE, 300)
    error = float(np.std(simulation.null_measurements[1].change))
    assert simulation.detection_rate(1, error * 2.8) < 0.4  # a t test at 5 % alone would have 0.8


@pytest.mark.parametrize("variants", [1, 4])
def test_false_verdicts_occur_in_at_most_5_percent_of_studies(variants):
    found = answers(design(variants), NOISE, 1000, 5)
    false = np.isin(found, ("grows", "shrinks")).any(0).mean()
    assert false <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / 1000)
    simulation = power.Simulation(design(variants), NOISE, 1000, seed=9)
    assert simulation.false_positive_rate() == pytest.approx(false, abs=0.03)


def test_predicted_number_of_needed_pairs_gives_the_expected_power():
    every = design(1)
    detectable = power.detectable_in_standard_errors(every)["depth"]
    noise = power.Noise(0.009, 0.3)
    simulated = power.Simulation(every, noise, 300)
    needed = power.pairs_needed(every[0].pairs, float(np.std(simulated.null_measurements[1].change)), detectable)
    times = round(needed / every[0].pairs)
    assert times >= 4
    larger = power.Simulation([power.repeated(g, times) for g in every], noise, 400, seed=3)
    seen = larger.detection_rate(1, verdict.MARGIN)
    assert 0.7 < seen < 0.92


def test_too_few_pairs_give_an_infinite_smallest_change():
    found = power.predict(design(6, seeds=1), NOISE, studies=100)
    assert all(not np.isfinite(p.minimum_detectable_change) for p in found)
