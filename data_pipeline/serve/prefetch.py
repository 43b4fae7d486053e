"""Results of consecutive calls, computed a few ahead by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
_LOOK_S = 0.2  # how often a caller that waits looks whether to leave
_END_S = 5.0  # how long threads are waited for when their work may hang


class _Found(NamedTuple, Generic[T]):
    """What computing a number came to."""

    result: T | None = None
    error: BaseException | None = None


class Prefetcher(Generic[T]):
    """Yields ``(i, compute(i))`` for i = start, start + 1, …; `ahead` results wait ready, 0 computes in the caller.

    Threads, no processes: the work is reads and copies that release the GIL, and a process would have to send every
    result through a pipe. An error in a thread is raised where its result would have come.

    Args:
        compute: gives a result; several threads may call it at a time.
        start: the first number.
        ahead: results that wait ready.
        threads: how many results are computed at a time; more than one pays where computing is waiting.
        leave: once it is set nothing is waited for: the next result that is not there is None, and the last.
    """

    def __init__(
        self,
        compute: Callable[[int], T],
        start: int,
        ahead: int,
        threads: int = 1,
        leave: threading.Event | None = None,
    ) -> None:
        self._compute, self._start, self._ahead, self._leave = compute, start, ahead, leave or threading.Event()
        self._changed = threading.Condition()  # guards what follows
        self._begun, self._taken = start, start  # the next number to compute, and to hand out
        self._ready: dict[int, tuple[T | None, BaseException | None]] = {}
        self._stopped = False
        count = min(threads, ahead)
        self._threads = [threading.Thread(target=self._work, name="data-prefetch", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[int, T | None]]:
        """See the class."""
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
        """Stop the threads and wait for them to end; not without end for what may have been left."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_END_S if self._leave.is_set() else None)

    def _next(self, number: int) -> _Found[T] | None:
        """The result of `number`; None when the prefetcher is closed meanwhile, or nothing is waited for any more."""
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
        """The next number to compute, once it is wanted; None when no more are."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._begun <= self._taken + self._ahead)
            if self._stopped:
                return None
            self._begun += 1
            return self._begun - 1
