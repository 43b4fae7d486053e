"""Files on a server, in an object store, or from a command: fetched whole or in ranges, with retries."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec

from bst_base.addresses import filled, redacted
from bst_base.errors import StorageError
from bst_base.stopping import STOP_REQUESTED, Stopped
from data_pipeline.format.shards import ShardError
from data_pipeline.store.base import REQUESTS, StorageConfig, StoreConfigError

_log = logging.getLogger(__name__)
_CHUNK = 8 << 20  # bytes of a whole file fetched in one request; a dropped connection loses at most this much
_LONGEST_WAIT_S = 30.0
_POLL_S = 0.2  # how often a waiting read checks whether it was interrupted
_NO_CREDENTIALS = {  # the clients' exceptions for missing credentials: a retry would fail too
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "TokenRetrievalError",
}

T = TypeVar("T")


class FoundFile(NamedTuple):
    """A file below an address."""

    name: str
    """Its path relative to the address."""
    size: int | None
    """Bytes; None if the store does not tell."""
    version: str
    """A version string from the store, such as its ETag or the time of the last change; empty if the store has none."""


class NoRangesError(StoreConfigError):
    """The server sends whole files when a byte range is asked for."""


class _NotLocal:
    """What the storages of files that are not on a local disk share: reads that can be interrupted, and no cache."""

    remote = True

    def __init__(self, where: str) -> None:
        self.where = where
        self._stop = threading.Event()

    def mapped(self, name: str) -> None:
        """See `Storage`."""

    def local_path(self, name: str) -> Path | None:
        """See `Storage`."""
        return None

    def fetch_ahead(self, now: Sequence[str], soon: Sequence[str]) -> None:
        """See `Storage`. Nothing is cached here."""

    def interrupt(self, stop: bool) -> None:
        """See `Storage`."""
        if stop:
            self._stop.set()
        else:
            self._stop.clear()

    def _check_interrupted(self, what: str) -> None:
        if self._stop.is_set() or STOP_REQUESTED.is_set():
            raise Stopped(f"{what}: reading was interrupted")


class RemoteStorage(_NotLocal):
    """The files under an fsspec address; see `base.Storage`."""

    def __init__(self, url: str, config: StorageConfig) -> None:
        super().__init__(redacted(url).partition("?")[0].rstrip("/"))
        self.file = ""
        """The name of the file, if `files` has found that the address is that of one file; else empty."""
        self._config = config
        full, self._hidden = filled(url)
        full, mark, query = full.partition("?")
        self._query = mark + query  # the signature of the address is sent with each file
        try:
            self._fs, self._root = fsspec.url_to_fs(full.rstrip("/"), **_options(url.partition("://")[0], config))
        except (ImportError, ValueError, TypeError) as error:
            raise StoreConfigError(f"{self.where}: cannot be opened: {self._said(error)}") from None

    def files(self) -> list[FoundFile]:
        """Return the files below the address, sorted by name. If the address is that of one file, return it.

        The list is empty if nothing is there.
        """

        def find() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            return self._fs.find(self._root + self._query, detail=True)

        try:
            found = self._try("", find) or self._try("", self._alone)
            found = {path: self._told(path, info) for path, info in found.items()}
        except FileNotFoundError:
            return []
        root = self._fs._strip_protocol(self._root).rstrip("/")
        if len(found) == 1 and next(iter(found)).partition("?")[0].rstrip("/") == root:
            root, _, name = root.rpartition("/")
            self._root, self.where, self.file = root, self.where.rpartition("/")[0], name
            return [_found_file(name, *found.values())]
        return sorted(_found_file(path[len(root) + 1 :], info) for path, info in found.items())

    def _alone(self) -> dict[str, dict[str, Any]]:
        """Return the file at the address, found by reading its first byte.

        A listing over HTTP cannot be used: it reports any error as absence.
        """
        path = self._root + self._query
        if "http" not in self._fs.protocol:
            return {}
        self._fs.cat_file(path, start=0, end=1)
        return {path: {}}

    def _told(self, path: str, info: dict[str, Any]) -> dict[str, Any]:
        """Return the store's information on a file. HTTP listings only contain names, so HTTP needs another request."""
        if info.get("size") is not None or "http" not in self._fs.protocol:
            return info
        return self._try("", lambda: self._fs.info(path + ("" if path.endswith(self._query) else self._query)))

    def whole(self, name: str) -> bytes:
        """See `Storage`."""
        return self._try(name, lambda: self._cat(name))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`."""
        buffer[:] = self._range(name, offset, offset + len(buffer))

    def chunks(self, name: str, size: int | None) -> Iterator[bytes]:
        """Yield the bytes of a file, in order. `size`: its number of bytes, if known."""
        if size is None:
            yield self.whole(name)
            return
        for start in range(0, size, _CHUNK):
            try:
                part = self._range(name, start, min(start + _CHUNK, size))
            except NoRangesError:
                yield self.whole(name)[start:]
                return
            yield part

    def _pause(self, name: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._stop.wait(min(left, _POLL_S))
            self._check_interrupted(f"{self.where}/{name}")

    def renew(self, name: str, attempt: int) -> bool:
        """See `Storage`. Every read fetches the bytes again, so the next one may be good."""
        if attempt >= self._config.attempts:
            return False
        self._back_off(name, attempt, "changed bytes")
        return True

    def _range(self, name: str, start: int, stop: int) -> bytes:
        def fetch() -> bytes:
            data = self._cat(name, start=start, end=stop)
            if len(data) > stop - start:
                raise NoRangesError(
                    f"{self.where}: the server sends whole files where a range is asked for; "
                    "set storage.cache_dir, or use a server that honours Range"
                )
            if len(data) < stop - start:
                raise EOFError(f"{len(data)} bytes received of the {stop - start} from {start} on")
            return data

        try:
            return self._try(name, fetch)
        except FileNotFoundError:
            raise ShardError(f"{self.where}/{name}: missing; copy it there again") from None

    def _cat(self, name: str, **span: int) -> bytes:
        """Make one attempt to read a file or a part of it.

        It ends after the deadline, or when reads are interrupted.
        """
        path = f"{self._root}/{name}{self._query}"
        begin, fs = time.monotonic(), self._fs
        if fs.async_impl:
            fetching = asyncio.run_coroutine_threadsafe(fs._cat_file(path, **span), fs.loop)
        else:  # a blocking call, so it runs in its own thread
            fetching = _in_a_thread(partial(fs.cat_file, path, **span))
        while True:
            try:
                return fetching.result(timeout=_POLL_S)
            except TimeoutError:
                if fetching.done():  # the TimeoutError comes from the request, not from this wait
                    raise
            try:
                self._check_interrupted(f"{self.where}/{name}")
                if time.monotonic() - begin > self._config.deadline_s:
                    raise TimeoutError(f"not done in {self._config.deadline_s:g} s (storage.deadline_s)")
            except (Stopped, TimeoutError):
                fetching.cancel()
                raise

    def _try(self, name: str, fetch: Callable[[], T]) -> T:
        """Call `fetch` until it succeeds. FileNotFoundError is passed on; the last failure becomes a StorageError.

        A refusal that no attempt can change is a StoreConfigError, at once. If the file is still too short at the last
        attempt, it counts as damaged (ShardError), not as an error of the store.
        """
        for attempt in range(1, self._config.attempts + 1):
            try:
                return fetch()
            except (FileNotFoundError, NoRangesError, Stopped):
                raise
            except PermissionError as error:
                raise StoreConfigError(
                    f"{self.where}/{name}: not allowed: {self._said(error)}; check the credentials"
                ) from None
            except Exception as error:  # each client has its own exceptions: timeouts, resets, 5xx, short answers
                reason = f"{type(error).__name__}: {self._said(error)}".rstrip(": ")
                if _NO_CREDENTIALS & {each.__name__ for each in type(error).__mro__}:
                    raise StoreConfigError(
                        f"{self.where}/{name}: {reason}; give them as the store's client expects"
                    ) from None
                if attempt == self._config.attempts:
                    kind = ShardError if isinstance(error, EOFError) else StorageError
                    raise kind(f"{self.where}/{name}: not read in {attempt} attempts; the last: {reason}") from None
                self._back_off(name, attempt, reason)
        raise AssertionError("unreachable")

    def _back_off(self, name: str, attempt: int, reason: str) -> None:
        """Wait before the attempt after this one."""
        wait = min(self._config.backoff_s * 2 ** (attempt - 1), _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
        _log.warning("%s/%s: %s; trying again in %.1f s", self.where, name, reason, wait)
        self._pause(name, wait)

    def _said(self, error: Exception) -> str:
        """Return an error's message without the secrets of the address."""
        text = str(error)
        for secret, name in self._hidden.items():
            text = text.replace(secret, name)
        return text


def _in_a_thread(work: Callable[[], bytes]) -> Future[bytes]:
    """Run work that may hang in a daemon thread, so that not even the end of the program waits for it."""
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name="data-store", daemon=True).start()
    return future


def _found_file(name: str, info: dict[str, Any]) -> FoundFile:
    said = (
        info.get(key)
        for key in (
            "ETag",
            "etag",
            "md5Hash",
            "checksum",
            "LastModified",
            "last_modified",
            "mtime",
            "created",
            "Last-Modified",
        )
    )
    size = info.get("size")
    return FoundFile(name, None if size is None else int(size), str(next((each for each in said if each), "")))


class PipeStorage(_NotLocal):
    """Files from the output of a shell command, in which ``{}`` is replaced by the file's name.

    The command does the retries. A command that writes nothing for `timeout_s` is killed, with all its child processes.
    """

    def __init__(self, command: str, timeout_s: float) -> None:
        super().__init__(f"pipe:{command}")
        self._timeout_s = timeout_s
        self._command = command if "{}" in command else f"{command}/{{}}"

    def whole(self, name: str) -> bytes:
        """See `Storage`."""
        return b"".join(self.chunks(name, None))

    def chunks(self, name: str, size: int | None) -> Iterator[bytes]:
        """Yield the bytes of a file, in order."""
        command = self._command.replace("{}", shlex.quote(name))
        with subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        ) as process:
            try:
                while data := self._output(process.stdout.fileno(), command):
                    yield data
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode:
            raise StorageError(f"pipe:{command}: exit status {process.returncode}")

    def _output(self, descriptor: int, command: str) -> bytes:
        """Return the next output of the command; empty at its end."""
        end = time.monotonic() + self._timeout_s
        while not select.select([descriptor], [], [], _POLL_S)[0]:
            self._check_interrupted(f"pipe:{command}")
            if time.monotonic() > end:
                raise StorageError(f"pipe:{command}: wrote nothing for {self._timeout_s:g} s (storage.timeout_s)")
        return os.read(descriptor, _CHUNK)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`. It is never called, since these files are always cached."""
        raise NotImplementedError

    def renew(self, name: str, attempt: int) -> bool:
        """See `Storage`. The command does the retries."""
        return False


def _options(scheme: str, config: StorageConfig) -> dict[str, Any]:
    """Return the file system's options, with this project's timeouts.

    Retries are made and logged here, not in the libraries.
    """
    options = {name: _from_environment(name, value) for name, value in config.options.items()}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=config.timeout_s, sock_read=config.timeout_s)
        options["client_kwargs"] = {"timeout": timeout} | options.get("client_kwargs", {})
        options.setdefault("get_client", _http_client)
    if scheme in ("s3", "s3a"):
        timeouts = {"connect_timeout": config.timeout_s, "read_timeout": config.timeout_s}
        own = timeouts | {"retries": {"max_attempts": 0}, "max_pool_connections": REQUESTS}  # its default is 10
        options["config_kwargs"] = own | options.get("config_kwargs", {})
    return options


async def _http_client(**options: Any) -> Any:
    """Return a client without its default limit of 100 connections; the reader has its own limit (REQUESTS)."""
    import aiohttp  # imported late: it is slow to import, and most corpora are local

    return aiohttp.ClientSession(**({"connector": aiohttp.TCPConnector(limit=0)} | options))


def _from_environment(name: str, value: Any) -> Any:
    """Return an option's value; a value written as $NAME is read from the environment."""
    if isinstance(value, dict):
        return {inner: _from_environment(f"{name}.{inner}", each) for inner, each in value.items()}
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    if value[1:] not in os.environ:
        raise StoreConfigError(f"storage.options.{name}: the environment variable {value[1:]} is not set")
    return os.environ[value[1:]]
