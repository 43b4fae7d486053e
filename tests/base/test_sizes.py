"""Formatted numbers of bytes."""

import pytest

from bst_base.sizes import readable_size, shortage


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_740_000, "1.7 MB"), (81.2e9, "81.2 GB"), (3.2e15, "3200.0 TB")],
)
def test_the_unit_is_the_one_in_which_the_number_is_short(count, said):
    assert readable_size(count) == said


def test_a_shortage_is_told_where_both_numbers_look_the_same():
    assert shortage(12.33e9, 12.31e9, "/runs") == "it needs 12.3 GB, /runs has 12.3 GB free, 20.0 MB too little"
