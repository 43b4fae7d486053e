"""A cache on a local disk: verified copies of files from another store."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from bst_base.errors import UserError
from bst_base.files import atomic_file
from bst_base.stopping import STOP_REQUESTED, Stopped
from data_pipeline.format.shards import ShardError
from data_pipeline.store.base import Storage
from data_pipeline.store.locks import take_lock
from data_pipeline.store.mapped import MappedFile
from data_pipeline.store.room import Room
from data_pipeline.store.storage import LocalStorage

_FETCHED_AT_ONCE = 8  # files of a corpus that are fetched ahead in parallel
_LOOK_S = 0.05  # how often to check whether another process has finished fetching the same file


class KnownFiles(Protocol):
    """The size and hash of each file of a corpus."""

    def __getitem__(self, name: str) -> tuple[int | None, str]:
        """Return (size in bytes or None if unknown, SHA-256) of a file."""


class WholeFiles(Storage, Protocol):
    """A storage that can stream whole files."""

    def chunks(self, name: str, size: int | None) -> Iterator[bytes]:
        """Yield the bytes of a file, in order. `size`: its number of bytes, if known."""


class CachedStorage:
    """A storage that copies each file at its first use, and reads from the copy; see `base.Storage`.

    A copy gets its final name only after its SHA-256 was checked. The name contains that hash, so corpora may share a
    directory, and a changed corpus never reads an old file. A lock per file lets each file be fetched once per machine.

    Args:
        source: the storage of the files.
        directory: the directory of the copies.
        files: (size in bytes or None if unknown, SHA-256) of each file by its name.
        limit: maximum bytes of all copies in the directory; None: no limit.
    """

    remote = False

    def __init__(self, source: WholeFiles, directory: Path, files: KnownFiles, limit: int | None = None) -> None:
        self.where = source.where
        self._source = source
        self._directory = directory.expanduser()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._local = LocalStorage(self._directory)
        self._files = files
        self._room = Room(self._directory, limit)
        self._room.remove_partials()
        self._present: set[str] = set()
        self._wanted: deque[str] = deque()  # files to fetch ahead
        self._stop = threading.Event()
        self._fetchers = 0
        self._counting = threading.Lock()  # guards `_fetchers`

    def whole(self, name: str) -> bytes:
        """See `Storage`. A damaged copy is fetched again."""
        with suppress(FileNotFoundError):  # another process may remove a copy at any time
            data = self._local.whole(self._copy(name))
            if hashlib.sha256(data).hexdigest() == self._files[name][1]:
                return data
        self.renew(name, attempt=1)
        return self._local.whole(self._copy(name))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`. A copy that was removed or cut short is fetched again."""
        try:
            self._local.read_into(self._copy(name), offset, buffer)
        except ShardError:
            self.renew(name, attempt=1)
            self._local.read_into(self._copy(name), offset, buffer)

    def mapped(self, name: str) -> MappedFile | None:
        """See `Storage`. It maps the copy, which is fetched if it does not exist."""
        return self._local.mapped(self._copy(name))

    def local_path(self, name: str) -> Path | None:
        """See `Storage`. It is None, since a file without a copy is not a missing file."""
        return None

    def interrupt(self, stop: bool) -> None:
        """See `Storage`."""
        if stop:
            self._wanted.clear()
            self._stop.set()
        else:
            self._stop.clear()
        self._source.interrupt(stop)

    def fetch_ahead(self, now: Sequence[str], soon: Sequence[str]) -> None:
        """See `Storage`. Raises UserError when the files of `now` do not fit into the limit."""
        sizes = [sum(self._files[name][0] or 0 for name in names) for names in (now, soon)]
        if not self._room.fits(sizes[0]):
            raise UserError(
                f"storage.cache_bytes: {self._room.limit:,} bytes hold no window of {self.where}, which has "
                f"{sizes[0]:,}; set it to three times that or more"
            )
        self._wanted = deque(
            name for name in [*now, *(soon if self._room.fits(sum(sizes)) else ())] if not self._is_here(name)
        )
        with self._counting:
            start = min(_FETCHED_AT_ONCE, len(self._wanted)) - self._fetchers
            self._fetchers += max(start, 0)
        for _ in range(start):
            threading.Thread(target=self._fetch_wanted, name="data-cache", daemon=True).start()

    def _is_here(self, name: str) -> bool:
        """Whether there is a copy of a file; marks it as used. Another process may have removed it."""
        copy = self._copy_name(name)
        if (self._directory / copy).exists():
            self._room.used(copy)
            return True
        self._present.discard(copy)
        return False

    def _fetch_wanted(self) -> None:
        """Fetch the wanted files until none is left. Errors are ignored here: the read of the file tries again."""
        try:
            while True:
                with suppress(UserError):
                    self._copy(self._wanted.popleft())
        except IndexError:
            pass
        finally:
            with self._counting:
                self._fetchers -= 1

    def renew(self, name: str, attempt: int) -> bool:
        """See `Storage`. The copy is fetched again once: its SHA-256 is compared when it is fetched."""
        if attempt > 1:
            return False
        copy = self._copy_name(name)
        with self._locked(copy):
            (self._directory / copy).unlink(missing_ok=True)
            self._present.discard(copy)
            self._local.forget()
        return True

    def _copy_name(self, name: str) -> str:
        return f"{self._files[name][1][:16]}-{name}"

    def _copy(self, name: str) -> str:
        """Return the name of a file's copy, which is fetched if it does not exist."""
        copy = self._copy_name(name)
        if copy in self._present:
            return copy
        with self._locked(copy):
            if (self._directory / copy).exists():
                self._room.used(copy)
            else:
                self._fetch(name, copy)
        self._present.add(copy)
        return copy

    def _fetch(self, name: str, copy: str) -> None:
        size = self._files[name][0] or 0
        self._room.take(size)
        try:
            done = self._write(name, copy)
        except BaseException:
            self._room.take(-size)
            raise
        self._room.take(done - size)

    def _write(self, name: str, copy: str) -> int:
        """Write the copy; return its number of bytes. Raises ShardError when its SHA-256 is wrong."""
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
        return done

    @contextmanager
    def _locked(self, copy: str) -> Iterator[None]:
        """Lock a copy, so that no other process on this machine fetches or removes it."""
        while (lock := take_lock(self._directory / f"{copy}.lock")) is None:
            if self._stop.wait(_LOOK_S) or STOP_REQUESTED.is_set():
                raise Stopped(f"{self.where}: the wait for another process that fetches {copy} was interrupted")
        with lock:
            yield
