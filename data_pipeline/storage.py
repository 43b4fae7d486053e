"""Where a corpus's files lie and how their bytes are fetched: a local directory here."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from data_pipeline.shards import ShardError

_OPEN_FILES = 256  # shards kept open; the usual limit of a process is 1024 descriptors


class Storage(Protocol):
    """The files of one corpus, by name; every method may be called from several threads."""

    where: str
    """The corpus's directory or address, for messages."""
    remote: bool
    """Bytes come over a network: what was once read well may arrive damaged the next time."""

    def whole(self, name: str) -> bytes:
        """A file's bytes; raises FileNotFoundError when it does not exist."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` on; raises ShardError when the file is missing or too short."""

    def local_path(self, name: str) -> Path | None:
        """The file on this machine's disk, where there is one."""


class LocalStorage:
    """A directory. Reads are `pread`, not a memory map: a page fault would hold the GIL while the disk works, and a
    file cut short while it is mapped would kill the process instead of raising an error."""

    remote = False

    def __init__(self, directory: str | Path) -> None:
        self.where = str(directory)
        self._directory = Path(directory)
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)  # an evicted file closes when its last reader ends

    def whole(self, name: str) -> bytes:
        """See `Storage`."""
        return (self._directory / name).read_bytes()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`."""
        file = self._open(name)
        done = 0
        while done < len(buffer):
            got = os.preadv(file.fileno(), [buffer[done:]], offset + done)
            if not got:
                raise ShardError(
                    f"{self._directory / name}: cut short: no bytes from {offset + done} on, where "
                    f"{len(buffer) - done} more are expected; copy it again"
                )
            done += got

    def local_path(self, name: str) -> Path:
        """See `Storage`."""
        return self._directory / name

    def _open_file(self, name: str) -> BinaryIO:
        path = self._directory / name
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise ShardError(f"{path}: the shard is missing; copy it again, or prepare the corpus again") from None
