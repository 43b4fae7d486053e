"""Distribution of rows over any number of ranks: each row once, in order, in equal micro-batches on all ranks."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.serve.spread import MASKED, Spread


@given(rows=st.integers(1, 200), dp=st.integers(1, 200), most=st.integers(1, 9))
def test_each_row_is_on_one_rank_and_ranks_have_equal_micro_batches(rows: int, dp: int, most: int) -> None:
    spread = Spread(rows, dp, most)
    ranks = [spread.of_micro_batches(rank) for rank in range(dp)]
    assert {(len(rank), *map(len, rank)) for rank in ranks} == {
        (spread.micro_batches, *[spread.micro_rows] * spread.micro_batches)
    }
    assert spread.micro_rows <= most
    served = [np.concatenate(rank) for rank in ranks]
    kept = [each[each != MASKED] for each in served]
    assert np.concatenate(kept).tolist() == list(range(rows))
    assert max(map(len, kept)) - min(map(len, kept)) <= 1
    assert len(kept[0]) == max(map(len, kept))  # the first rank always has rows
    for rank, own in enumerate(kept):
        assert (served[rank][: len(own)] == own).all()  # masked rows come last
        assert all(spread.owner(row) == rank for row in own.tolist())
    assert spread.masked == sum((each == MASKED).sum() for each in served)


@given(shares=st.integers(1, 20), dp=st.integers(1, 20), most=st.integers(1, 9))
def test_no_rows_are_masked_if_micro_batches_divide_the_rows(shares: int, dp: int, most: int) -> None:
    spread = Spread(shares * dp * most, dp, most)
    assert (spread.micro_batches, spread.micro_rows, spread.masked, spread.imbalance_message()) == (shares, most, 0, "")


def test_number_of_masked_rows_is_minimal() -> None:
    assert (Spread(6, 1, 4).micro_batches, Spread(6, 1, 4).micro_rows) == (2, 3)
    assert (Spread(8, 3, 4).micro_rows, Spread(8, 3, 4).masked) == (3, 1)
    assert (Spread(64, 512, 4).micro_batches, Spread(64, 512, 4).micro_rows) == (1, 1)


def test_masked_sequences_are_reported_per_rank() -> None:
    assert Spread(8, 5, 1).imbalance_message() == (
        "3 of 5 ranks have 2 sequences, 2 of 5 ranks have 1 sequence and 1 masked: 20% of the computation is wasted"
    )
    assert Spread(14, 2, 4).imbalance_message(sp=2) == (
        "2 of 2 groups of 2 ranks have 7 sequences and 1 masked: 12% of the computation is wasted; "
        "train.micro_sequences 1 or 7 would waste nothing"
    )
    assert Spread(15, 2, 3).imbalance_message() == (
        "1 of 2 ranks has 8 sequences and 1 masked, 1 of 2 ranks has 7 sequences and 2 masked: 17% of the computation "
        "is wasted; train.micro_sequences 2 or 4 would waste 6%"
    )


@given(rows=st.integers(1, 60), dp=st.integers(1, 12), most=st.integers(1, 9))
def test_advised_micro_batch_size_is_the_nearest_with_fewest_masked_rows(rows: int, dp: int, most: int) -> None:
    def masked(micro: int) -> int:
        per_rank = math.ceil(rows / dp)
        batches = math.ceil(per_rank / micro)
        return dp * batches * math.ceil(per_rank / batches) - rows

    least = min(map(masked, range(1, rows + 1)))
    advised = Spread(rows, dp, most).better_micro_sizes()
    if masked(most) == least:
        assert advised == []
        return
    good = [micro for micro in range(1, math.ceil(rows / dp) + 1) if masked(micro) == least]
    below, above = [micro for micro in good if micro < most], [micro for micro in good if micro > most]
    assert advised == ([max(below)] if below else []) + ([min(above)] if above else [])
