"""The goodput model compared with a simulation of random failures."""

from __future__ import annotations

import random

import pytest

from bst_dist.tools.bench.goodput import MEAN_TIMES, best_interval_s, goodput


def drawn(mean: float, recovery: float, interval: float, cost: float, failures: int = 40_000) -> float:
    """Return the goodput of a simulation in which the time of each failure is drawn."""
    chance, useful, total = random.Random(0), 0.0, 0.0
    for _ in range(failures):
        until = chance.expovariate(1 / mean)
        useful += interval * int(until / (interval + cost))  # saved training time; the rest is lost
        total += until + recovery
    return useful / total


@pytest.mark.parametrize(
    ("mean", "recovery", "interval", "cost"),
    [(28_440, 20, 240, 1), (6_480, 150, 600, 30), (1_000, 300, 500, 50), (100, 10, 5, 0.1)],
)
def test_the_goodput_formula_equals_simulated_failures(mean, recovery, interval, cost):
    assert goodput(mean, recovery, interval, cost) == pytest.approx(drawn(mean, recovery, interval, cost), abs=0.01)


def test_the_best_interval_is_better_than_those_around_it():
    for mean in MEAN_TIMES:
        seconds = mean.hours * 3600
        best = best_interval_s(seconds, 1.0)
        share = goodput(seconds, 20.0, best, 1.0)
        assert all(goodput(seconds, 20.0, best * factor, 1.0) < share for factor in (0.5, 2.0))


def test_goodput_is_one_without_failures_and_costs():
    assert goodput(1e12, 0, 1, 0) == pytest.approx(1.0)
