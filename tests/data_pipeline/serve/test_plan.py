"""Which sequence each row of each step reads."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bst_base.errors import UserError
from data_pipeline.serve.mixture import quotas
from data_pipeline.serve.plan import Plan, Shuffled, Streaming


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, list[float]]], int]:
    """(sequences of each corpus, segments, rows) that streaming mode accepts."""
    count, rows = draw(st.integers(1, 3)), draw(st.integers(3, 7))
    sequences = draw(st.lists(st.integers(rows, 40), min_size=count, max_size=count))
    weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=count, max_size=count).filter(
        lambda w: any(w) and all(q or not x for q, x in zip(quotas(w, rows), w, strict=True))
    )
    starts = [0, *sorted(draw(st.sets(st.integers(1, 80), max_size=3)))]
    return sequences, [(start, draw(weights)) for start in starts], rows


class Read(NamedTuple):
    """What one row reads in one step."""

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


@given(streams())
def test_streaming_reads_no_sequence_twice_in_a_pass_and_leaves_none_behind(drawn: Any) -> None:
    sequences, segments, rows = drawn
    read = [each[:3] for step in assignments(Streaming(*drawn), rows, 120) for each in step]
    assert max(Counter(read).values()) == 1
    for corpus, total in enumerate(sequences):
        epochs = Counter(epoch for c, epoch, _ in read if c == corpus)
        begun = sorted(epochs)
        assert begun == list(range(len(begun)))
        # Rows may be a step apart, and the rows of a new segment first share what the old ones left.
        assert all(epochs[epoch] == total for epoch in begun[: -2 - len(segments)])


@given(streams())
def test_streaming_says_truly_whether_a_row_continues(drawn: Any) -> None:
    _, segments, rows = drawn
    cuts = {step for step, _ in segments}
    before = None
    for step, assigned in enumerate(assignments(Streaming(*drawn), rows, 120)):
        for row, each in enumerate(assigned):
            last = before[row] if before else None
            follows = last is not None and last[:2] == each[:2] and last.sequence + 1 == each.sequence
            assert each.continues == (follows and step not in cuts)
        before = assigned


@given(sequences=st.integers(5, 2000), rows=st.integers(1, 5), step=st.integers(0, 10**7))
def test_streaming_rows_stay_within_a_step_of_each_other(sequences: int, rows: int, step: int) -> None:
    """Over any number of passes, no row reads more of the corpus than another by more than a sequence."""
    epochs = [each.epoch for each in assigned_in(Streaming([sequences], [(0, [1.0])], rows), step, rows)]
    assert max(epochs) - min(epochs) <= 1


@given(streams(), st.integers(0, 119))
def test_streaming_deals_rows_by_the_weights(drawn: Any, step: int) -> None:
    sequences, segments, rows = drawn
    weights = [weights for start, weights in segments if start <= step][-1]
    dealt = Counter(each.corpus for each in assigned_in(Streaming(*drawn), step, rows))
    assert [dealt[corpus] for corpus in range(len(sequences))] == quotas(weights, rows)


@given(
    sequences=st.lists(st.integers(50, 1000), min_size=1, max_size=3), rows=st.integers(1, 64), seed=st.integers(0, 9)
)
def test_shuffled_reads_each_sequence_once_a_pass(sequences: list[int], rows: int, seed: int) -> None:
    plan = Shuffled(sequences, [(0, [1.0] * len(sequences))], rows, seed)
    read = [each[:3] for step in assignments(plan, rows, 3000 // rows) for each in step]
    assert max(Counter(read).values()) == 1
    for corpus, total in enumerate(sequences):
        epochs = Counter(epoch for c, epoch, _ in read if c == corpus)
        assert all(epochs[epoch] == total for epoch in sorted(epochs)[:-1])


def test_a_step_runs_on_into_the_next_pass() -> None:
    plan = Shuffled([5], [(0, [1.0])], rows=3, seed=0)
    assert [[each.epoch for each in step] for step in assignments(plan, 3, 4)] == [
        [0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 2, 2],
    ]  # fmt: skip


def test_some_rows_of_some_steps_are_those_of_all() -> None:
    for plan in (Shuffled([50, 70], [(0, [1, 2])], 8, 1), Streaming([50, 70], [(0, [1, 2])], 8)):
        whole = plan.assign(range(40), range(8))
        for found, expected in zip(plan.assign(range(9, 14), range(2, 5)), whole, strict=True):
            assert found.tolist() == expected.reshape(40, 8)[9:14, 2:5].reshape(-1).tolist()


def test_streaming_refuses_what_would_leave_rows_or_corpora_without_text() -> None:
    with pytest.raises(UserError, match="8 rows would divide 7 sequences"):
        Streaming([7], [(0, [1.0])], 8)
    with pytest.raises(UserError, match="comes to none of 4 rows"):
        Streaming([50, 50], [(0, [0.99, 0.01])], 4)
