"""Where a corpus's files lie, and how their bytes are fetched: a local directory, a server or object store, a cache.

`open_storage` chooses by the address:

- ``/data/books`` or ``file:///data/books``: a directory, read in place;
- ``https://…``, ``s3://…``, ``gs://…`` and what else fsspec knows: ranges of the files, or whole files into a cache;
- ``pipe:COMMAND``: a shell command that writes the file named in place of ``{}`` to its output; only into a cache.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from data_pipeline.format.shards import ShardError
from data_pipeline.store.base import Storage, StorageConfig, StorageError
from data_pipeline.store.mapped import MappedFile

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
        return PipeStorage(url.removeprefix("pipe:"), config.timeout_s)
    scheme, separator, path = url.partition("://")
    if not separator:
        return LocalStorage(url)
    return LocalStorage(path) if scheme == "file" else RemoteStorage(url, config)


class LocalStorage:
    """A directory, read with `preadv`, or mapped for the kernel to copy from (`mapped`).

    Nothing of this process touches a map: a page that cannot be read would kill it, where a read that fails is an error
    that the recipe's policy for bad shards is for.
    """

    remote = False

    def __init__(self, directory: str | Path) -> None:
        self.where = str(directory)
        self._directory = Path(directory)
        # An evicted file closes when its last reader ends.
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)

    def whole(self, name: str) -> bytes:
        """See `Storage`."""
        return (self._directory / name).read_bytes()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`."""
        file, done = self._open(name), 0
        while done < len(buffer):
            try:
                got = os.preadv(file.fileno(), [buffer[done:]], offset + done)
            except OSError as error:
                where = f"{self._directory / name}: cannot be read at byte {offset + done}"
                raise ShardError(f"{where}: {error.strerror}; is the disk or the mount in order?") from None
            if not got:
                raise ShardError(
                    f"{self._directory / name}: cut short: it ends before byte {offset + done}, "
                    f"where {len(buffer) - done} more are expected; copy it again"
                )
            done += got

    def mapped(self, name: str) -> MappedFile | None:
        """See `Storage`."""
        try:
            return MappedFile(self._directory / name)
        except OSError:
            return None

    def local_path(self, name: str) -> Path:
        """See `Storage`."""
        return self._directory / name

    def renew(self, name: str) -> bool:
        """See `Storage`: there is but this copy."""
        return False

    def forget(self) -> None:
        """Open the files anew at their next use: one has been replaced."""
        self._open.cache_clear()

    def fetch_ahead(self, now: Sequence[str], soon: Sequence[str]) -> None:
        """See `Storage`: nothing is kept here."""

    def interrupt(self, stop: bool) -> None:
        """See `Storage`: reads of a local file are not waited for."""

    def _open_file(self, name: str) -> BinaryIO:
        path = self._directory / name
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise ShardError(f"{path}: the shard is missing; copy it again, or prepare the corpus again") from None
        except OSError as error:
            if error.errno in (errno.EIO, errno.ESTALE):
                raise ShardError(f"{path}: cannot be opened: {error.strerror}") from None
            raise StorageError(f"{path}: cannot be opened: {error.strerror}") from None  # nothing is known of its bytes
