"""Files that are on the disk, and whose digest is known, when the call that writes them returns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FileRecord = dict[str, Any]  # {"bytes": int, "sha256": str}, and of a shard "start": the byte of its first value


class Hashing:
    """A binary file that digests what is written to it; torch.save and safetensors write front to back."""

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
    """The files one rank writes under a directory, with their digests by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def open(self, name: str) -> Iterator[Hashing]:
        """Write the file `name`; synced and recorded when the block ends."""
        with (self.root / name).open("wb") as file:
            hashing = Hashing(file)
            yield hashing
            file.flush()
            os.fsync(file.fileno())
        self.records[name] = hashing.record()
