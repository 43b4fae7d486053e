"""Results of consecutive calls, computed a few ahead by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Yields ``(i, compute(i))`` for i = start, start + 1, …; `ahead` results wait ready, 0 computes in the caller.

    One thread, no processes: the work is reads and copies that release the GIL, and a process would have to send every
    result through a pipe. An error in the thread is raised where its result would have come.
    """

    def __init__(self, compute: Callable[[int], T], start: int, ahead: int) -> None:
        self._compute = compute
        self._start = start
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=max(ahead, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="data-prefetch", daemon=True) if ahead else None
        if self._thread:
            self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, T]]:
        """See the class."""
        number = self._start
        while not self._stop.is_set():
            yield number, self._next() if self._thread else self._compute(number)
            number += 1

    def close(self) -> None:
        """Stop the thread and wait for it to end."""
        self._stop.set()
        while self._thread and self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.05)

    def _next(self) -> T:
        result, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        return result

    def _work(self) -> None:
        number = self._start
        while not self._stop.is_set():
            try:
                self._put(self._compute(number), None)
            except BaseException as error:
                self._put(None, error)
                return
            number += 1

    def _put(self, *item: object) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _drain(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass
