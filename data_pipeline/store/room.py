"""The disk space of the copies in a directory, kept below a limit by all processes of a machine together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bst_base.locks import flock
from data_pipeline.store.locks import take_lock

_COPY = re.compile(r"[0-9a-f]{16}-.*(?<!\.lock)(?<!\.partial)")
_PARTIAL = re.compile(r"([0-9a-f]{16}-.*)\.[0-9a-f]{8}\.partial")  # a copy that is being written, or was when killed
_KEPT = 0.9  # fraction of the limit down to which copies are removed, so that not every new copy removes some


class Room:
    """Keeps the size of the copies in a directory below a limit, by removing the least recently used ones.

    A process that has a removed copy open continues to read it. Others fetch it again. The total size is stored in a
    file, and counted again from the directory whenever copies are removed.

    Args:
        directory: the directory of the copies.
        limit: bytes; None: no limit.
    """

    def __init__(self, directory: Path, limit: int | None) -> None:
        self.limit = limit
        self._directory = directory

    def used(self, copy: str) -> None:
        """Mark a copy as used now."""
        if self.limit is not None:
            with suppress(FileNotFoundError):
                os.utime(self._directory / copy)

    def take(self, size: int) -> None:
        """Add `size` bytes (may be negative) to the total, after removing copies until they fit."""
        if self.limit is None:
            return
        with self._counted() as (taken, write):
            if taken is None or taken + size > self.limit:
                taken = self._remove(int(self.limit * _KEPT) - size)
            write(taken + size)

    def fits(self, size: int) -> bool:
        """Whether files of `size` bytes can be kept at the same time."""
        return self.limit is None or size <= self.limit * _KEPT

    def remove_partials(self) -> None:
        """Remove the partial copies that no process writes: those of processes that were killed."""
        for entry in os.scandir(self._directory):
            if (partial := _PARTIAL.fullmatch(entry.name)) and (lock := take_lock(self._lock_of(partial[1]))):
                with lock:
                    Path(entry.path).unlink(missing_ok=True)
                    self._lock_of(partial[1]).unlink(missing_ok=True)

    def _remove(self, wanted: int) -> int:
        """Remove what killed processes left, then the least recently used copies until the total is at most `wanted`.

        Returns the new total, in bytes.
        """
        self.remove_partials()
        copies, taken = [], 0
        for entry in os.scandir(self._directory):
            with suppress(FileNotFoundError):
                found = entry.stat()
                taken += found.st_size
                if _COPY.fullmatch(entry.name):
                    copies.append((found.st_mtime_ns, entry.name, found.st_size))
        for _, name, size in sorted(copies):
            if taken <= wanted:
                break
            (self._directory / name).unlink(missing_ok=True)
            if lock := take_lock(self._lock_of(name)):
                with lock:
                    self._lock_of(name).unlink(missing_ok=True)
            taken -= size
        return taken

    def _lock_of(self, copy: str) -> Path:
        return self._directory / f"{copy}.lock"

    @contextmanager
    def _counted(self) -> Iterator[tuple[int | None, Callable[[int], None]]]:
        """Yield (the stored total or None if unknown, a function that stores a new total), under a lock."""
        path = self._directory / ".taken"
        with path.open("a+") as file:
            flock(file, path, wait=True)
            file.seek(0)
            text = file.read()

            def write(taken: int) -> None:
                file.truncate(0)
                file.write(str(max(taken, 0)))
                file.flush()

            yield (int(text) if text.isdigit() else None), write
