"""Results computed ahead by a thread."""

from __future__ import annotations

import itertools
import threading

import pytest

from data_pipeline.serve.prefetch import Prefetcher


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_results_come_in_order_from_the_start(ahead: int) -> None:
    prefetcher = Prefetcher(lambda i: i * i, 5, ahead)
    assert list(itertools.islice(prefetcher, 4)) == [(5, 25), (6, 36), (7, 49), (8, 64)]
    prefetcher.close()


def test_no_more_than_asked_is_computed_ahead() -> None:
    computed: list[int] = []
    enough = threading.Event()

    def compute(number: int) -> int:
        computed.append(number)
        if len(computed) == 3:
            enough.set()
        return number

    prefetcher = Prefetcher(compute, 0, 2)
    assert enough.wait(10)  # two wait ready, the third waits for room
    assert not threading.Event().wait(0.2) and computed == [0, 1, 2]
    prefetcher.close()


def test_an_error_comes_where_its_result_would_have() -> None:
    def compute(number: int) -> float:
        return 1 / (2 - number)

    results = iter(Prefetcher(compute, 0, 2))
    assert [next(results), next(results)] == [(0, 0.5), (1, 1.0)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_closing_ends_the_thread_and_may_be_repeated() -> None:
    before = threading.active_count()
    prefetcher = Prefetcher(lambda i: i, 0, 2)
    next(iter(prefetcher))
    prefetcher.close()
    prefetcher.close()
    assert threading.active_count() == before
