"""Writes files so that they are synced to disk, and their digests known, when the call returns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FileRecord = dict[str, Any]  # {"bytes": int, "sha256": str}; for a shard also "start", the offset of its first value


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

    @contextmanager
    def open(self, name: str) -> Iterator[Hashing]:
        """Open the file `name` for writing; sync and record it when the context ends."""
        with (self.root / name).open("wb") as file:
            hashing = Hashing(file)
            yield hashing
            file.flush()
            os.fsync(file.fileno())
        self.records[name] = hashing.record()
