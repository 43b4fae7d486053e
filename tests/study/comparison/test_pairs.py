"""Steps of two runs that can be compared because they read the same data."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bst_dist.study.comparison.pairs import by_step


def summary(bytes_per_step):
    """Return a stub of a run whose steps have read these bytes; the loss is 1 nat per token."""
    train = [
        {"step": step, "tokens": 8 * step, "loss_nats": 1.0, "bits_per_byte": 8 / read}
        for step, read in enumerate(bytes_per_step, start=1)
    ]
    return SimpleNamespace(result=SimpleNamespace(train=train))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([20, 21, 22, 23, 24], [1, 2, 3, 4, 5]),
        ([20, 21, 22, 99, 98], [1, 2, 3]),
        ([20, 21, 99, 98, 97], []),  # two of five are the same by chance
        ([20, 21, 99, 98], []),  # half of them is not a majority
    ],
)
def test_steps_are_paired_if_most_of_them_read_equal_data(other, expected):
    pairs = by_step(summary([20, 21, 22, 23, 24]), summary(other))
    assert [one["step"] for one, _ in pairs] == expected
