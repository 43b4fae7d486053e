"""Opens the store of a corpus: a local directory, a server or object store, or a command.

`open_storage` chooses by the address:

- ``/data/books`` or ``file:///data/books``: a directory, read in place;
- ``https://…``, ``s3://…``, ``gs://…`` and all else that fsspec knows: ranges of files, or whole files into a cache;
- ``pipe:COMMAND``: a shell command that writes the file, named in place of ``{}``, to its output; only with a cache.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from bst_base.errors import StorageError
from bst_base.files import path_in_errors
from data_pipeline.format.shards import ShardError
from data_pipeline.store.base import Storage, StorageConfig, StoreConfigError
from data_pipeline.store.mapped import MappedFile

_OPEN_FILES = 256  # shards kept open; a process may usually have 1024 descriptors


class UnreadableShardError(ShardError):
    """The disk or the mount fails to read a shard. It counts as damaged, but a restart may read it."""

    exit_status = StorageError.exit_status


def open_storage(url: str, config: StorageConfig) -> Storage:
    """Return the storage at an address, without a cache; raises UserError if it is not allowed or cannot be used."""
    from data_pipeline.store.remote import (  # imported late: fsspec is slow to import, and most corpora are local
        PipeStorage,
        RemoteStorage,
    )

    if url.startswith("pipe:"):
        if not config.allow_pipe:
            raise StoreConfigError(
                f"{url}: a pipe: address runs a shell command; set storage.allow_pipe to true if you trust it"
            )
        if config.cache_dir is None:
            raise StoreConfigError(f"{url}: a pipe: address gives whole files only; set storage.cache_dir")
        return PipeStorage(url.removeprefix("pipe:"), config.timeout_s)
    scheme, separator, path = url.partition("://")
    if not separator:
        return LocalStorage(url)
    return LocalStorage(path) if scheme == "file" else RemoteStorage(url, config)


class LocalStorage:
    """A directory, read with `preadv`, or memory-mapped so that the kernel can copy from it (`mapped`).

    This process never touches a map itself: a page that cannot be read would kill it. A failed `preadv` is an ordinary
    error, which `on_bad_shard` handles.
    """

    remote = False

    def __init__(self, directory: str | Path) -> None:
        self.where = str(directory)
        self._directory = Path(directory)
        # A file that the cache evicts is closed when its last reader ends.
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)

    def whole(self, name: str) -> bytes:
        """See `Storage`."""
        path = self._directory / name
        with path_in_errors(path):
            return path.read_bytes()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`."""
        file, done = self._open(name), 0
        while done < len(buffer):
            try:
                got = os.preadv(file.fileno(), [buffer[done:]], offset + done)
            except OSError as error:
                where = f"{self._directory / name}: cannot be read at byte {offset + done}"
                raise UnreadableShardError(f"{where}: {error.strerror}; is the disk or the mount in order?") from None
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

    def renew(self, name: str, attempt: int) -> bool:
        """See `Storage`. There is only this copy."""
        return False

    def forget(self) -> None:
        """Open the files again at their next use, because one was replaced."""
        self._open.cache_clear()

    def fetch_ahead(self, now: Sequence[str], soon: Sequence[str]) -> None:
        """See `Storage`. Nothing is cached here."""

    def interrupt(self, stop: bool) -> None:
        """See `Storage`. Local reads are not interrupted."""

    def _open_file(self, name: str) -> BinaryIO:
        path = self._directory / name
        try:
            return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise ShardError(f"{path}: the shard is missing; copy it again, or prepare the corpus again") from None
        except OSError as error:
            if error.errno in (errno.EIO, errno.ESTALE):
                raise UnreadableShardError(f"{path}: cannot be opened: {error.strerror}") from None
            raise StorageError.of(error, path, doing="open") from None  # the bytes may be good
