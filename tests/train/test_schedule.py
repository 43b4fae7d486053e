from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bst_dist.train.config import ScheduleConfig
from bst_dist.train.schedule import constant_until, factor

schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["wsd", "cosine"]),
    warmup_steps=st.integers(0, 50),
    decay_fraction=st.floats(0, 1),
    decay_shape=st.sampled_from(["1-sqrt", "linear"]),
    final_fraction=st.floats(0, 1),
)


@given(schedules, st.integers(1, 300))
def test_the_rate_rises_only_during_the_warm_up(schedule, steps):
    factors = [factor(schedule, step, steps) for step in range(steps)]
    warm = min(schedule.warmup_steps, steps)
    assert all(0 < f <= 1 or (f == 0 == schedule.final_fraction) for f in factors)
    assert factors[:warm] == sorted(factors[:warm])
    assert all(a >= b - 1e-12 for a, b in zip(factors[warm:], factors[warm + 1 :], strict=False))
    assert all(f >= schedule.final_fraction - 1e-12 for f in factors[warm:])


@pytest.mark.parametrize(("shape", "half_way"), [("1-sqrt", 1 - math.sqrt(0.5)), ("linear", 0.5)])
def test_wsd_is_constant_until_its_decay(shape, half_way):
    schedule = ScheduleConfig(warmup_steps=10, decay_fraction=0.4, decay_shape=shape)
    factors = [factor(schedule, step, 100) for step in range(101)]
    assert factors[0] == 0.1
    assert factors[9:61] == [1.0] * 52
    assert factors[80] == pytest.approx(half_way)
    assert factors[100] == 0.0 < factors[99]


def test_cosine_is_half_a_period_from_the_warm_up_to_the_end():
    schedule = ScheduleConfig(kind="cosine", warmup_steps=20, final_fraction=0.1)
    assert factor(schedule, 70, 120) == pytest.approx(0.55)
    assert factor(schedule, 45, 120) == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi / 4)))
    assert factor(schedule, 120, 120) == pytest.approx(0.1)


@given(schedules, st.integers(1, 300))
def test_the_rate_is_at_its_peak_until_the_reported_decay_start(schedule, steps):
    until = constant_until(schedule, steps)
    rates = [factor(schedule, step, steps) for step in range(steps)]
    if until is None:
        assert schedule.kind == "cosine" or all(rate == 1 for rate in rates[schedule.warmup_steps :])
        return
    assert all(rate == 1 for rate in rates[schedule.warmup_steps : until + 1])
    if schedule.final_fraction < 0.9:  # nearer to 1, rounding hides the decay
        assert all(rate < 1 for rate in rates[until + 1 :])
