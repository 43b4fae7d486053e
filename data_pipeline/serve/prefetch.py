"""Results of consecutive calls, computed a few ahead by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Yields ``(i, compute(i))`` for i = start, start + 1, …; `ahead` results wait ready, 0 computes in the caller.

    Threads, no processes: the work is reads and copies that release the GIL, and a process would have to send every
    result through a pipe. An error in a thread is raised where its result would have come.

    Args:
        compute: gives a result; several threads may call it at a time.
        start: the first number.
        ahead: results that wait ready.
        threads: how many results are computed at a time; more than one pays where computing is waiting.
    """

    def __init__(self, compute: Callable[[int], T], start: int, ahead: int, threads: int = 1) -> None:
        self._compute, self._start, self._ahead = compute, start, ahead
        self._changed = threading.Condition()  # guards what follows
        self._begun, self._taken = start, start  # the next number to compute, and to hand out
        self._ready: dict[int, tuple[T | None, BaseException | None]] = {}
        self._stopped = False
        count = min(threads, ahead)
        self._threads = [threading.Thread(target=self._work, name="data-prefetch", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[int, T]]:
        """See the class."""
        number = self._start
        while not self._stopped:
            if self._threads:
                result, error = self._next(number)
            else:
                result, error = self._compute(number), None
            if error is not None:
                self.close()
                raise error
            if self._stopped and self._threads:
                return
            yield number, result
            number += 1

    def close(self) -> None:
        """Stop the threads and wait for them to end."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self, number: int) -> tuple[T | None, BaseException | None]:
        """The result of `number`, or nothing when the prefetcher is closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._ready or self._stopped)
            self._taken = number + 1
            self._changed.notify_all()
            return self._ready.pop(number, (None, None))

    def _work(self) -> None:
        while (number := self._claim()) is not None:
            try:
                found: tuple[T | None, BaseException | None] = (self._compute(number), None)
            except BaseException as error:
                found = (None, error)
            with self._changed:
                if not self._stopped:
                    self._ready[number] = found
                self._changed.notify_all()
            if found[1] is not None:
                return

    def _claim(self) -> int | None:
        """The next number to compute, once it is wanted; None when no more are."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._begun <= self._taken + self._ahead)
            if self._stopped:
                return None
            self._begun += 1
            return self._begun - 1
