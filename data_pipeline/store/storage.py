"""Where a corpus's files lie, and how their bytes are fetched: a local directory, a server or object store, a cache.

`open_storage` chooses by the address:

- ``/data/books`` or ``file:///data/books``: a directory, read in place;
- ``https://…``, ``s3://…``, ``gs://…`` and what else fsspec knows: ranges of the files, or whole files into a cache;
- ``pipe:COMMAND``: a shell command that writes the file named in place of ``{}`` to its output; only into a cache.
"""

from __future__ import annotations

import mmap
import os
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from data_pipeline.format.shards import ShardError
from data_pipeline.store.base import Storage, StorageConfig, StorageError

_OPEN_FILES = 256  # shards kept open; the usual limit of a process is 1024 descriptors


def open_storage(url: str, config: StorageConfig) -> Storage:
    """The storage at an address, not yet cached; raises UserError for one that may not or cannot be used."""
    from data_pipeline.store.remote import (  # fsspec takes long to import; most corpora are local
        PipeStorage,
        RemoteStorage,
    )

    if url.startswith("pipe:"):
        if not config.allow_pipe:
            raise StorageError(
                f"{url}: a pipe: address runs a shell command; set storage.allow_pipe to true if you trust it"
            )
        if config.cache_dir is None:
            raise StorageError(f"{url}: a pipe: address gives whole files only; set storage.cache_dir")
        return PipeStorage(url.removeprefix("pipe:"))
    scheme, separator, path = url.partition("://")
    if not separator:
        return LocalStorage(url)
    return LocalStorage(path) if scheme == "file" else RemoteStorage(url, config)


class LocalStorage:
    """A directory. `view` is a map of the file, which spares a system call and a copy a run; pages that are not in
    memory are best touched by what releases the GIL, as a CRC does. `read_into` is `pread`."""

    remote = False

    def __init__(self, directory: str | Path) -> None:
        self.where = str(directory)
        self._directory = Path(directory)
        # An evicted file closes when its last reader ends.
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)
        self._map = lru_cache(maxsize=_OPEN_FILES)(self._map_file)

    def whole(self, name: str) -> bytes:
        """See `Storage`."""
        return (self._directory / name).read_bytes()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`."""
        file = self._open(name)
        done = os.preadv(file.fileno(), [buffer], offset)
        while done < len(buffer):
            got = os.preadv(file.fileno(), [buffer[done:]], offset + done)
            if not got:
                raise self._cut_short(name, offset + done, len(buffer) - done)
            done += got

    def view(self, name: str, offset: int, size: int) -> memoryview:
        """See `Storage`."""
        file, data = self._map(name)
        # A page beyond the end of a file that was cut short since would kill the process instead of raising an error.
        if (end := os.fstat(file.fileno()).st_size) < offset + size:
            raise self._cut_short(name, end, offset + size - end)
        return data[offset : offset + size]

    def local_path(self, name: str) -> Path:
        """See `Storage`."""
        return self._directory / name

    def renew(self, name: str) -> bool:
        """See `Storage`: there is but this copy."""
        return False

    def forget(self) -> None:
        """Open the files anew at their next use: one has been replaced."""
        self._open.cache_clear()
        self._map.cache_clear()

    def _open_file(self, name: str) -> BinaryIO:
        path = self._directory / name
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise ShardError(f"{path}: the shard is missing; copy it again, or prepare the corpus again") from None

    def _cut_short(self, name: str, end: int, wanted: int) -> ShardError:
        return ShardError(
            f"{self._directory / name}: cut short: it ends before byte {end}, "
            f"where {wanted} more are expected; copy it again"
        )

    def _map_file(self, name: str) -> tuple[BinaryIO, memoryview]:
        file = self._open(name)
        return file, memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
