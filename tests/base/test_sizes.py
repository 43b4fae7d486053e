"""Formatted numbers of bytes, and counts."""

import pytest

from bst_base.sizes import counted, readable_size, shortage


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_740_000, "1.7 MB"), (81.2e9, "81.2 GB"), (3.2e15, "3200.0 TB")],
)
def test_readable_size_chooses_the_unit(count, said):
    assert readable_size(count) == said


def test_only_one_thing_is_in_the_singular():
    assert [counted(count, "rank") for count in range(3)] == ["0 ranks", "1 rank", "2 ranks"]
    assert [counted(count, "batch", "batches") for count in (1, 2)] == ["1 batch", "2 batches"]


def test_shortage_is_stated_if_rounded_sizes_are_equal():
    assert shortage(12.33e9, 12.31e9, "/runs") == "it needs 12.3 GB, /runs has 12.3 GB free, 20.0 MB too little"
