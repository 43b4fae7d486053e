"""A number of rows that changes during a run: the same series of rows, divided differently into steps."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.serve.order.sizes import BatchSizes


@given(changes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=4), first=st.integers(1, 9))
def test_each_step_starts_where_the_previous_one_ended(changes: list[tuple[int, int]], first: int) -> None:
    sizes, step, rows = BatchSizes.of(first), 0, {0: first}
    for later, count in changes:
        step += later
        sizes, rows = sizes.then(step, count), {at: n for at, n in rows.items() if at < step} | {step: count}
    begins, own = [0], first
    for at in range(30):
        own = rows.get(at, own)
        begins.append(begins[-1] + own)
    assert [sizes.first(at) for at in range(31)] == begins
    assert sizes.firsts(range(3, 9)).tolist() == begins[3:9]
    assert BatchSizes.from_state(json.loads(json.dumps(sizes.state()))) == sizes
    assert sizes.last == own


def test_unchanged_number_of_rows_is_not_recorded_as_change() -> None:
    assert BatchSizes.of(4).then(7, 4) == BatchSizes.of(4)
    assert BatchSizes.of(4).state() == {"rows": 4}
    assert BatchSizes.of(4).then(7, 6).then(7, 5).changes == ((0, 4), (7, 5))
