"""Prefetching: threads compute the results of the next calls in advance."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
_LOOK_S = 0.2  # how often a waiting caller checks whether to leave
_END_S = 5.0  # how long `close` waits for threads whose work may hang


class _Found(NamedTuple, Generic[T]):
    """The outcome of one call: a result or an error."""

    result: T | None = None
    error: BaseException | None = None


class Prefetcher(Generic[T]):
    """Yields ``(i, compute(i))`` for i = start, start + 1, …, and keeps `ahead` results ready.

    With ``ahead=0``, results are computed in the caller's thread. It uses threads, not processes: the work is reads and
    copies that release the GIL, and a process would have to send every result through a pipe. An error in a thread is
    raised in place of its result.

    Args:
        compute: returns a result. Several threads may call it at the same time.
        start: the first number.
        ahead: how many results are kept ready.
        threads: how many results are computed in parallel. More than one helps when `compute` waits.
        leave: once it is set, the iterator waits for nothing. If the next result is not ready, it yields None and ends.
    """

    def __init__(
        self,
        compute: Callable[[int], T],
        start: int,
        ahead: int,
        threads: int = 1,
        leave: threading.Event | None = None,
    ) -> None:
        self._compute, self._start, self._ahead = compute, start, ahead
        self._leave = leave or threading.Event()
        self._changed = threading.Condition()  # guards the attributes below
        self._begun, self._taken = start, start  # the next number to compute, and the next one to yield
        self._ready: dict[int, _Found[T]] = {}
        self._stopped = False
        count = min(threads, ahead)
        self._threads = [threading.Thread(target=self._work, name="data-prefetch", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[int, T | None]]:
        """Yield the results in order; see the class."""
        number = self._start
        while not self._stopped:
            found = self._next(number) if self._threads else self._computed(number)
            if found is None or (found.error and self._leave.is_set()):
                if self._leave.is_set():
                    yield number, None
                return
            if found.error is not None:
                self.close()
                raise found.error
            yield number, found.result
            number += 1

    def close(self) -> None:
        """Stop the threads and wait for them to end.

        Once `leave` is set, it waits at most 5 s for each, since their work may hang.
        """
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_END_S if self._leave.is_set() else None)

    def _next(self, number: int) -> _Found[T] | None:
        """Return the result of `number`.

        Returns None when the prefetcher is closed, or when `leave` is set and there is no result yet.
        """
        with self._changed:
            while not (number in self._ready or self._stopped or self._leave.is_set()):
                self._changed.wait(_LOOK_S)
            self._taken = number + 1
            self._changed.notify_all()
            return self._ready.pop(number, None)

    def _work(self) -> None:
        while (number := self._claim()) is not None:
            found = self._computed(number)
            with self._changed:
                if not self._stopped:
                    self._ready[number] = found
                self._changed.notify_all()
            if found.error is not None:
                return

    def _computed(self, number: int) -> _Found[T]:
        try:
            return _Found(self._compute(number))
        except BaseException as error:
            return _Found(error=error)

    def _claim(self) -> int | None:
        """Return the next number to compute, once it is needed; None when the prefetcher is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._begun <= self._taken + self._ahead)
            if self._stopped:
                return None
            self._begun += 1
            return self._begun - 1
