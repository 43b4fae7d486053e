"""Which sequence each row of each step reads."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bst_base.errors import UserError
from data_pipeline.serve.order.order_v1 import LaneStreaming, quotas
from data_pipeline.serve.order.plan import Plan, Streaming, make_shuffled
from data_pipeline.serve.order.sizes import BatchSizes


class Read(NamedTuple):
    """The sequence that one row reads in one step."""

    corpus: int
    epoch: int
    sequence: int
    continues: bool


def assigned_in(plan: Plan, step: int, rows: int) -> list[Read]:
    return assignments(plan, rows, 1, step)[0]


def assignments(plan: Plan, rows: int, steps: int, start: int = 0) -> list[list[Read]]:
    columns = plan.assign(range(start, start + steps), range(rows))
    found = [Read(*each) for each in zip(*(column.tolist() for column in columns), strict=True)]
    return [found[step * rows : (step + 1) * rows] for step in range(steps)]


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, list[float]]], int, int]:
    """Draw (sequences of each corpus, segments, rows, seed) that streaming mode accepts."""
    count, rows = draw(st.integers(1, 3)), draw(st.integers(3, 7))
    sequences = draw(st.lists(st.integers(rows, 60), min_size=count, max_size=count))
    weights = st.lists(st.sampled_from([0.0, 0.03, 0.5, 1.0, 2.0]), min_size=count, max_size=count).filter(any)
    starts = [0, *sorted(draw(st.sets(st.integers(1, 80), max_size=3)))]
    return sequences, [(start, draw(weights)) for start in starts], rows, draw(st.integers(0, 9))


@given(streams())
def test_streaming_reads_each_sequence_once_per_pass(drawn: Any) -> None:
    sequences, _, rows, _ = drawn
    steps = 160
    plan = Streaming(*drawn)
    read = [each[:3] for step in assignments(plan, rows, steps) for each in step]
    assert max(Counter(read).values()) == 1
    for corpus, total in enumerate(sequences):
        own = [epoch * total + sequence for c, epoch, sequence in read if c == corpus]
        assert len(own) == plan.consumed(steps)[corpus]
        # A stretch reads one pass, and up to two more if a corpus has two more rows in it than elsewhere.
        assert set(range(max(0, max(own, default=0) - 3 * total))) <= set(own)


# The third weights take effect at the end of a stretch, at step 6; the fourth are requested at step 5.
LATE = ([9, 3], [(0, [0.03, 0.0]), (1, [0.03, 0.0]), (4, [0.0, 0.03]), (5, [0.03, 0.0])], 3, 0)


@example(LATE)
@given(streams())
def test_streaming_continues_flag_is_correct(drawn: Any) -> None:
    before, plan, rows = None, Streaming(*drawn), drawn[2]
    for assigned in assignments(plan, rows, 120):
        for row, each in enumerate(assigned):
            if each.continues:
                last = before[row]
                assert (last[:2], last.sequence + 1) == (each[:2], each.sequence)
        before = assigned


@pytest.mark.parametrize(("sequences", "rows", "cuts"), [([100], 4, 4 * 4), ([1000, 1000], 4, None)])
def test_streaming_rows_are_rarely_interrupted(sequences: list[int], rows: int, cuts: int | None) -> None:
    """Rows stop once per stretch, and at the end of a pass."""
    plan = Streaming(sequences, [(0, [1.0] * len(sequences))], rows, 0)
    steps = 100 if cuts else 1000
    stopped = sum(not each.continues for step in assignments(plan, rows, steps) for each in step)
    assert stopped == cuts if cuts else stopped <= rows * (steps // 256 + 1) + 4


@given(
    weights=st.lists(st.sampled_from([0.0, 0.0015, 0.05, 0.1, 0.85, 7.0]), min_size=2, max_size=5).filter(any),
    rows=st.sampled_from([4, 16, 24]),
    step=st.integers(0, 10**9),
)
def test_streaming_shares_equal_the_weights_for_any_number_of_rows(weights, rows, step) -> None:
    plan = Streaming([10**6] * len(weights), [(0, weights)], rows, 0)
    exact = np.array(weights) / sum(weights) * rows * step
    assert np.abs(plan.consumed(step) - exact).max() <= 3 * 256  # three rows of one stretch


def test_sixteen_streaming_rows_match_weights_of_85_10_and_5_percent() -> None:
    plan = Streaming([100_000] * 3, [(0, [0.85, 0.10, 0.05])], 16, 0)
    corpus = plan.assign(range(0, 256 * 100, 64), range(16)).corpus
    assert np.bincount(corpus) / len(corpus) == pytest.approx([0.85, 0.10, 0.05], abs=0.002)


def test_streaming_of_order_version_2_is_pinned() -> None:
    """Existing runs depend on this order; version 3 assigns corpora in the same way."""
    plan = Streaming([5000, 700, 90], [(0, [0.7, 0.2, 0.1]), (1000, [0.5, 0, 0.5])], 6, 3)
    found = [plan.assign(range(step, step + 1), range(6)) for step in (0, 299, 300, 1079, 1080, 5000)]
    assert [list(map(list, zip(*(c.tolist() for c in each[:3]), strict=True))) for each in found] == GOLDEN
    assert plan.consumed(5001).tolist() == GOLDEN_CONSUMED


GOLDEN = [  # (corpus, pass, sequence) of six rows, in the steps of the test
    [[1, 0, 0], [0, 0, 0], [0, 0, 90], [1, 0, 90], [0, 0, 180], [0, 0, 270]],
    [[0, 0, 1109], [0, 0, 1199], [1, 0, 389], [0, 0, 1289], [0, 0, 1379], [1, 0, 479]],
    [[0, 0, 1110], [0, 0, 1200], [1, 0, 390], [0, 0, 1290], [0, 0, 1380], [1, 0, 480]],
    [[0, 0, 4229], [2, 6, 89], [0, 0, 4319], [0, 0, 4409], [1, 1, 649], [0, 0, 4499]],
    [[2, 7, 0], [0, 0, 4500], [2, 7, 30], [0, 0, 4530], [2, 7, 60], [0, 0, 4560]],
    [[2, 137, 20], [0, 3, 1220], [2, 137, 50], [0, 3, 1250], [2, 137, 80], [0, 3, 1280]],
]
GOLDEN_CONSUMED = [16263, 1350, 12393]


@st.composite
def lane_streams(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, list[float]]], int]:
    """Draw (sequences of each corpus, segments, rows) that version 1 accepts."""
    count, rows = draw(st.integers(1, 3)), draw(st.integers(3, 7))
    sequences = draw(st.lists(st.integers(rows, 40), min_size=count, max_size=count))
    weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=count, max_size=count).filter(
        lambda w: any(w) and all(q or not x for q, x in zip(quotas(w, rows), w, strict=True))
    )
    starts = [0, *sorted(draw(st.sets(st.integers(1, 80), max_size=3)))]
    return sequences, [(start, draw(weights)) for start in starts], rows


@given(lane_streams())
def test_lanes_read_each_sequence_once_per_pass(drawn: Any) -> None:
    sequences, segments, rows = drawn
    read = [each[:3] for step in assignments(LaneStreaming(*drawn), rows, 120) for each in step]
    assert max(Counter(read).values()) == 1
    for corpus, total in enumerate(sequences):
        epochs = Counter(epoch for c, epoch, _ in read if c == corpus)
        begun = sorted(epochs)
        assert begun == list(range(len(begun)))
        # Rows may be one step apart, and the rows of a new segment first share the sequences that the old ones left.
        assert all(epochs[epoch] == total for epoch in begun[: -2 - len(segments)])


@given(lane_streams())
def test_lanes_continues_flag_is_correct(drawn: Any) -> None:
    _, segments, rows = drawn
    cuts = {step for step, _ in segments}
    before = None
    for step, assigned in enumerate(assignments(LaneStreaming(*drawn), rows, 120)):
        for row, each in enumerate(assigned):
            last = before[row] if before else None
            follows = last is not None and last[:2] == each[:2] and last.sequence + 1 == each.sequence
            assert each.continues == (follows and step not in cuts)
        before = assigned


@given(sequences=st.integers(5, 2000), rows=st.integers(1, 5), step=st.integers(0, 10**7))
def test_rows_of_lanes_differ_by_at_most_one_pass(sequences: int, rows: int, step: int) -> None:
    """Over any number of passes, no row reads more than one sequence more of the corpus than another."""
    epochs = [each.epoch for each in assigned_in(LaneStreaming([sequences], [(0, [1.0])], rows), step, rows)]
    assert max(epochs) - min(epochs) <= 1


@given(lane_streams(), st.integers(0, 119))
def test_lanes_assign_rows_according_to_the_weights(drawn: Any, step: int) -> None:
    sequences, segments, rows = drawn
    weights = [weights for start, weights in segments if start <= step][-1]
    dealt = Counter(each.corpus for each in assigned_in(LaneStreaming(*drawn), step, rows))
    assert [dealt[corpus] for corpus in range(len(sequences))] == quotas(weights, rows)


@given(
    sequences=st.lists(st.integers(50, 1000), min_size=1, max_size=3), rows=st.integers(1, 64), seed=st.integers(0, 9)
)
def test_shuffled_reads_each_sequence_once_a_pass(sequences: list[int], rows: int, seed: int) -> None:
    plan = make_shuffled(sequences, [(0, [1.0] * len(sequences))], BatchSizes.of(rows), seed)
    read = [each[:3] for step in assignments(plan, rows, 3000 // rows) for each in step]
    assert max(Counter(read).values()) == 1
    for corpus, total in enumerate(sequences):
        epochs = Counter(epoch for c, epoch, _ in read if c == corpus)
        assert all(epochs[epoch] == total for epoch in sorted(epochs)[:-1])


def test_one_step_can_contain_two_passes() -> None:
    plan = make_shuffled([5], [(0, [1.0])], BatchSizes.of(3), seed=0)
    assert [[each.epoch for each in step] for step in assignments(plan, 3, 4)] == [
        [0, 0, 0],
        [0, 0, 1],
        [1, 1, 1],
        [1, 2, 2],
    ]


def test_assignment_of_some_rows_equals_part_of_the_whole() -> None:
    for plan in (
        make_shuffled([50, 70], [(0, [1, 2])], BatchSizes.of(8), 1),
        Streaming([50, 70], [(0, [1, 2])], 8, 1),
        LaneStreaming([50, 70], [(0, [1, 2])], 8),
    ):
        whole = plan.assign(range(40), range(8))
        for found, expected in zip(plan.assign(range(9, 14), range(2, 5)), whole, strict=True):
            assert found.tolist() == expected.reshape(40, 8)[9:14, 2:5].reshape(-1).tolist()


def test_streaming_refuses_more_rows_than_sequences_and_too_small_weights() -> None:
    with pytest.raises(UserError, match="8 rows, but only 7 sequences"):
        Streaming([7], [(0, [1.0])], 8, 0)
    with pytest.raises(UserError, match="8 rows, but only 7 sequences"):
        LaneStreaming([7], [(0, [1.0])], 8)
    with pytest.raises(UserError, match="is too small for any of 4 rows"):
        LaneStreaming([50, 50], [(0, [0.99, 0.01])], 4)
