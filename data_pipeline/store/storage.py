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
from typing import Any, BinaryIO, Protocol

from pydantic import Field

from bst_base.errors import UserError
from bst_base.settings import Config
from data_pipeline.format.shards import ShardError

_OPEN_FILES = 256  # shards kept open; the usual limit of a process is 1024 descriptors


class StorageError(UserError):
    """A store that cannot be reached, or does not do what is needed of it; never skipped as a bad shard is."""


class StorageConfig(Config):
    """How files that are not on this machine's disk are fetched."""

    cache_dir: Path | None = None
    """Directory for verified copies of whole shards, shared by all processes of a machine; without one, ranges of the
    shards are read from the store at every use. It may grow to the size of the corpora."""
    attempts: int = Field(6, ge=1)
    """How often one read is tried before it is an error."""
    backoff_s: float = Field(0.5, ge=0)
    """Seconds before the second attempt; doubled for each further one, up to 30."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds without a byte after which an attempt is given up."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the fsspec file system: an endpoint, a profile, a project."""
    allow_pipe: bool = False
    """Run the shell commands of `pipe:` addresses; only for recipes whose author you trust."""


class Storage(Protocol):
    """The files of one corpus, by name; every method may be called from several threads."""

    where: str
    """The corpus's directory or address, for messages."""
    remote: bool
    """Reads go over a network: slow each, many at a time, and good bytes may arrive damaged the next time."""

    def whole(self, name: str) -> bytes:
        """A file's bytes; raises FileNotFoundError when it does not exist."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` on; raises ShardError when the file is missing or too short."""

    def view(self, name: str, offset: int, size: int) -> memoryview:
        """The same bytes in place, not yet read; only where `remote` is false."""

    def local_path(self, name: str) -> Path | None:
        """The file's path where it belongs on this machine's disk."""

    def renew(self, name: str) -> bool:
        """Called on a file that was found damaged: true when another copy was fetched, so that reading may succeed."""


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
