"""Writes files so that they are synced to disk, and their digests known, when the call returns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bst_base.files import path_in_errors

FileRecord = dict[str, Any]  # {"bytes": int, "sha256": str}; for a shard also "start", the offset of its first value
PART = 1 << 26
"""Bytes after which `Files` syncs a file that is still being written."""


class Hashing:
    """A binary file for sequential writing that computes the SHA-256 of the written data."""

    def __init__(self, file: Any) -> None:
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self.bytes += len(view)
        return self._file.write(view)

    def flush(self) -> None:
        self._file.flush()

    def record(self) -> FileRecord:
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


class Files:
    """The files that one rank writes into a directory, with their records by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records: dict[str, FileRecord] = {}
        self.bytes = 0
        """Bytes written so far. While this grows, the storage works, however slowly."""

    @contextmanager
    def open(self, name: str) -> Iterator[Hashing]:
        """Open the file `name` for writing; sync and record it when the context ends."""
        path = self.root / name
        with path_in_errors(path), path.open("wb") as file:
            hashing = _InParts(file, self)
            yield hashing
            hashing.sync()
        self.records[name] = hashing.record()


class _InParts(Hashing):
    """Writes and syncs at most PART bytes at a time, and counts them.

    The page cache takes any amount at once, so a single sync at the end of a large file could take longer than the
    watchdog waits for a sign of progress.
    """

    def __init__(self, file: Any, files: Files) -> None:
        super().__init__(file)
        self._files, self._unsynced = files, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for begin in range(0, len(view), PART):
            part = view[begin : begin + PART]
            super().write(part)
            self._files.bytes += len(part)
            self._unsynced += len(part)
            if self._unsynced >= PART:
                self.sync()
        return len(view)

    def sync(self) -> None:
        self.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0
