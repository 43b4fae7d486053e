"""Verified copies, on this machine's disk, of files that lie elsewhere."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from bst_base.files import atomic_file
from data_pipeline.format.shards import ShardError
from data_pipeline.store.base import Storage
from data_pipeline.store.storage import LocalStorage


class WholeFiles(Storage, Protocol):
    """A storage that gives whole files piece by piece."""

    def chunks(self, name: str, size: int | None) -> Iterator[bytes]:
        """The bytes of a file, in order; `size` is how many, where that is known."""


class CachedStorage:
    """A storage whose files are copied whole at their first use, and read from the copies; see `storage.Storage`.

    A copy takes its name only after its SHA-256 was found right, and the name holds that hash, so corpora may share a
    directory and a changed corpus never meets an old file. Processes take turns: each file is fetched once a machine.

    Args:
        source: where the files are.
        directory: where the copies go.
        files: (bytes, SHA-256) of each file by its name; bytes None where that is not known.
    """

    remote = False

    def __init__(self, source: WholeFiles, directory: Path, files: dict[str, tuple[int | None, str]]) -> None:
        self.where = source.where
        self._source = source
        self._directory = directory.expanduser()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._local = LocalStorage(self._directory)
        self._files = files
        self._present: set[str] = set()

    def whole(self, name: str) -> bytes:
        """See `Storage`; a copy that was damaged is fetched again."""
        with suppress(FileNotFoundError):  # a cleaner may remove a copy at any time
            data = self._local.whole(self._copy(name))
            if hashlib.sha256(data).hexdigest() == self._files[name][1]:
                return data
        self.renew(name)
        return self._local.whole(self._copy(name))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`; a copy that was removed or cut short is fetched again."""
        try:
            self._local.read_into(self._copy(name), offset, buffer)
        except ShardError:
            self.renew(name)
            self._local.read_into(self._copy(name), offset, buffer)

    def local_path(self, name: str) -> Path | None:
        """See `Storage`: a copy that is not there yet is not a missing file."""
        return None

    def interrupt(self, stop: bool) -> None:
        """See `Storage`."""
        self._source.interrupt(stop)

    def renew(self, name: str) -> bool:
        """See `Storage`."""
        copy = self._copy_name(name)
        with self._locked(copy):
            (self._directory / copy).unlink(missing_ok=True)
            self._present.discard(copy)
            self._local.forget()
        return True

    def _copy_name(self, name: str) -> str:
        return f"{self._files[name][1][:16]}-{name}"

    def _copy(self, name: str) -> str:
        """The name of a file's copy, which is there when this returns."""
        copy = self._copy_name(name)
        if copy in self._present:
            return copy
        with self._locked(copy):
            if not (self._directory / copy).exists():
                self._fetch(name, copy)
        self._present.add(copy)
        return copy

    def _fetch(self, name: str, copy: str) -> None:
        size, sha256 = self._files[name]
        digest, done = hashlib.sha256(), 0
        with atomic_file(self._directory / copy) as file:
            for data in self._source.chunks(name, size):
                digest.update(data)
                done += len(data)
                file.write(data)
            if digest.hexdigest() != sha256:
                raise ShardError(
                    f"{self.where}/{name}: the {done} bytes received are not the file that the manifest names; "
                    "the copy there is damaged or of another corpus"
                )

    @contextmanager
    def _locked(self, copy: str) -> Iterator[None]:
        """Keep the machine's other processes from fetching or dropping the same file."""
        with (self._directory / f"{copy}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
