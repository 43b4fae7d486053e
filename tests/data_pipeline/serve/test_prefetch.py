"""Results computed ahead by a thread."""

from __future__ import annotations

import itertools
import threading

import pytest

from data_pipeline.serve.prefetch import Prefetcher


@pytest.mark.parametrize(("ahead", "threads"), [(0, 1), (1, 1), (3, 1), (3, 2), (2, 9)])
def test_results_come_in_order_from_the_start(ahead: int, threads: int) -> None:
    prefetcher = Prefetcher(lambda i: i * i, 5, ahead, threads)
    assert list(itertools.islice(prefetcher, 4)) == [(5, 25), (6, 36), (7, 49), (8, 64)]
    prefetcher.close()


def test_number_of_prefetched_results_is_limited() -> None:
    computed: list[int] = []
    enough = threading.Event()

    def compute(number: int) -> int:
        computed.append(number)
        if len(computed) == 3:
            enough.set()
        return number

    prefetcher = Prefetcher(compute, 0, 2)
    assert enough.wait(60)  # two results are ready, the third waits for space
    assert not threading.Event().wait(0.2) and computed == [0, 1, 2]
    prefetcher.close()


def test_error_is_raised_at_the_position_of_its_result() -> None:
    def compute(number: int) -> float:
        return 1 / (2 - number)

    results = iter(Prefetcher(compute, 0, 2))
    assert [next(results), next(results)] == [(0, 0.5), (1, 1.0)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_several_threads_return_results_in_order() -> None:
    """The first result is ready only after the next two have started."""
    begun = [threading.Event() for _ in range(8)]

    def compute(number: int) -> int:
        begun[number].set()
        if number == 0:
            assert begun[1].wait(60) and begun[2].wait(60)
        return number

    prefetcher = Prefetcher(compute, 0, 3, threads=3)
    assert list(itertools.islice(prefetcher, 3)) == [(0, 0), (1, 1), (2, 2)]
    assert not begun[7].is_set()
    prefetcher.close()


def test_error_of_a_later_result_is_raised_after_earlier_results() -> None:
    failed = threading.Event()

    def compute(number: int) -> int:
        if number == 1:
            failed.set()
            raise KeyError(number)
        assert failed.wait(60)
        return number

    results = iter(Prefetcher(compute, 0, 4, threads=4))
    assert next(results) == (0, 0)
    with pytest.raises(KeyError):
        next(results)


def test_closing_wakes_a_waiting_caller() -> None:
    release, got = threading.Event(), []
    prefetcher = Prefetcher(lambda _: release.wait(60), 0, 2)
    waiting = threading.Thread(target=lambda: got.extend(prefetcher))
    waiting.start()
    closing = threading.Thread(target=prefetcher.close)
    closing.start()
    release.set()
    waiting.join(60), closing.join(60)
    assert not waiting.is_alive() and not closing.is_alive() and len(got) <= 2


def test_closing_ends_the_thread_and_may_be_repeated() -> None:
    before = threading.active_count()
    prefetcher = Prefetcher(lambda i: i, 0, 2)
    next(iter(prefetcher))
    prefetcher.close()
    prefetcher.close()
    assert threading.active_count() == before
