"""The room that copies take up in a directory, kept below a limit by all processes of a machine together."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_COPY = re.compile(r"[0-9a-f]{16}-.*(?<!\.lock)(?<!\.partial)")
_KEPT = 0.9  # of the limit: what is left after copies were removed, so that it is not done for every one


class Room:
    """Keeps the copies in a directory below a number of bytes, by removing those used longest ago.

    A process that has a removed copy open reads on in it; one that has not fetches it again. What is taken up is
    counted in a file, and counted anew from the directory when copies are removed.

    Args:
        directory: where the copies are.
        limit: bytes; None: no limit.
    """

    def __init__(self, directory: Path, limit: int | None) -> None:
        self.limit = limit
        self._directory = directory

    def used(self, copy: str) -> None:
        """Note that a copy is in use."""
        if self.limit is not None:
            with suppress(FileNotFoundError):
                os.utime(self._directory / copy)

    def take(self, size: int) -> None:
        """Count `size` bytes more (or fewer), after removing copies until they fit."""
        if self.limit is None:
            return
        with self._counted() as (taken, write):
            if taken is None or taken + size > self.limit:
                taken = self._remove(int(self.limit * _KEPT) - size)
            write(taken + size)

    def fits(self, size: int) -> bool:
        """Whether so many bytes can stay at a time."""
        return self.limit is None or size <= self.limit * _KEPT

    def _remove(self, wanted: int) -> int:
        """Remove the copies used longest ago until all take up `wanted` bytes or fewer; returns what they do."""
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
            (self._directory / f"{name}.lock").unlink(missing_ok=True)
            taken -= size
        return taken

    @contextmanager
    def _counted(self) -> Iterator[tuple[int | None, object]]:
        """(bytes taken up as far as is known, what writes another number), while no other process counts."""
        with (self._directory / ".taken").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()

            def write(taken: int) -> None:
                file.truncate(0)
                file.write(str(max(taken, 0)))
                file.flush()

            yield (int(text) if text.isdigit() else None), write
