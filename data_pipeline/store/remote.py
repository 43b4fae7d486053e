"""Files on a server, in an object store, or behind a command: fetched whole or in ranges, and tried again."""

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
from bst_base.stopping import TOLD, Stopped
from data_pipeline.format.shards import ShardError
from data_pipeline.store.base import REQUESTS, StorageConfig, StorageError

_log = logging.getLogger(__name__)
_CHUNK = 8 << 20  # bytes of a whole file fetched in one request: what a dropped connection costs
_LONGEST_WAIT_S = 30.0
_POLL_S = 0.2  # how often a read that waits looks whether it was interrupted
_NO_CREDENTIALS = {  # what clients raise when there is nothing to sign with: the next attempt would be no better
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
    "DefaultCredentialsError", "TokenRetrievalError",
}  # fmt: skip

T = TypeVar("T")


class FoundFile(NamedTuple):
    """A file below an address."""

    name: str
    """Its path from the address on."""
    size: int | None
    """Bytes; None where the store does not say."""
    version: str
    """What tells it from other content of the same size, as far as the store says: its ETag, or when it was written."""


class NoRangesError(StorageError):
    """The server sends whole files where a range was asked for."""


class RemoteStorage:
    """The files under an fsspec address; see `storage.Storage`."""

    remote = True

    def __init__(self, url: str, config: StorageConfig) -> None:
        self.where = redacted(url).partition("?")[0].rstrip("/")
        self.file = ""
        """The name of the one file, where `files` has found that the address is a file's."""
        self._config = config
        self._stop = threading.Event()
        full, self._hidden = filled(url)
        full, mark, query = full.partition("?")
        self._query = mark + query  # what signs the address signs each file of it
        try:
            self._fs, self._root = fsspec.url_to_fs(full.rstrip("/"), **_options(url.partition("://")[0], config))
        except (ImportError, ValueError, TypeError) as error:
            raise StorageError(f"{self.where}: cannot be opened: {self._said(error)}") from None

    def files(self) -> list[FoundFile]:
        """The files below the address, sorted by name; the one file where it is a file's, none where nothing is."""

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
        """The file at the address, asked for by its first byte: HTTP's listing takes any error for an absence."""
        path = self._root + self._query
        if "http" not in self._fs.protocol:
            return {}
        self._fs.cat_file(path, start=0, end=1)
        return {path: {}}

    def _told(self, path: str, info: dict[str, Any]) -> dict[str, Any]:
        """What the store says of a file; HTTP's listings say nothing but its name."""
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
        """The bytes of a file, in order; `size` is how many, where that is known."""
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

    def mapped(self, name: str) -> None:
        """See `Storage`."""

    def local_path(self, name: str) -> Path | None:
        """See `Storage`."""
        return None

    def fetch_ahead(self, now: Sequence[str], soon: Sequence[str]) -> None:
        """See `Storage`: nothing is kept here."""

    def interrupt(self, stop: bool) -> None:
        """See `Storage`."""
        if stop:
            self._stop.set()
        else:
            self._stop.clear()

    def _pause(self, name: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._stop.wait(min(left, _POLL_S))
            self._check_interrupted(name)

    def _check_interrupted(self, name: str) -> None:
        if self._stop.is_set() or TOLD.is_set():
            raise Stopped(f"{self.where}/{name}: reading was interrupted")

    def renew(self, name: str) -> bool:
        """See `Storage`: every read fetches anew, so one more may arrive whole."""
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
        """One attempt at the bytes of a file or of a part of it, that ends in time and when reads are interrupted."""
        path = f"{self._root}/{name}{self._query}"
        begin, fs = time.monotonic(), self._fs
        if fs.async_impl:
            fetching = asyncio.run_coroutine_threadsafe(fs._cat_file(path, **span), fs.loop)
        else:  # a call that nothing but its own thread could wait for
            fetching = _in_a_thread(partial(fs.cat_file, path, **span))
        while True:
            try:
                return fetching.result(timeout=_POLL_S)
            except TimeoutError:
                if fetching.done():  # the attempt's own
                    raise
            try:
                self._check_interrupted(name)
                if time.monotonic() - begin > self._config.deadline_s:
                    raise TimeoutError(f"not done in {self._config.deadline_s:g} s (storage.deadline_s)")
            except (Stopped, TimeoutError):
                fetching.cancel()
                raise

    def _try(self, name: str, fetch: Callable[[], T]) -> T:
        """Call `fetch` until it succeeds; FileNotFoundError passes, and the last failure is a StorageError.

        A file that stays too short is damage (ShardError) rather than a store out of order.
        """
        for attempt in range(1, self._config.attempts + 1):
            try:
                return fetch()
            except (FileNotFoundError, StorageError, Stopped):
                raise
            except PermissionError as error:
                raise StorageError(
                    f"{self.where}/{name}: not allowed: {self._said(error)}; check the credentials"
                ) from None
            except Exception as error:  # every file system has its own: timeouts, resets, 5xx, half an answer
                reason = f"{type(error).__name__}: {self._said(error)}".rstrip(": ")
                if _NO_CREDENTIALS & {each.__name__ for each in type(error).__mro__}:
                    raise StorageError(
                        f"{self.where}/{name}: {reason}; give them as the store's client expects"
                    ) from None
                if attempt == self._config.attempts:
                    kind = ShardError if isinstance(error, EOFError) else StorageError
                    raise kind(f"{self.where}/{name}: not read in {attempt} attempts; the last: {reason}") from None
                wait = min(self._config.backoff_s * 2 ** (attempt - 1), _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
                _log.warning("%s/%s: %s; trying again in %.1f s", self.where, name, reason, wait)
                self._pause(name, wait)
        raise AssertionError("unreachable")

    def _said(self, error: Exception) -> str:
        """What an error says, without the secrets of the address."""
        text = str(error)
        for secret, name in self._hidden.items():
            text = text.replace(secret, name)
        return text


def _in_a_thread(work: Callable[[], bytes]) -> Future[bytes]:
    """Begin some work that may hang: not even the end of the program waits for it."""
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
    said = (info.get(key) for key in ("ETag", "etag", "md5Hash", "checksum", "LastModified", "last_modified", "mtime",
                                      "created", "Last-Modified"))  # fmt: skip
    size = info.get("size")
    return FoundFile(name, None if size is None else int(size), str(next((each for each in said if each), "")))


class PipeStorage:
    """Files that a shell command writes to its output, its ``{}`` replaced by their name; retries are the command's.

    A command that writes nothing for `timeout_s` is given up, with all that it has started.
    """

    remote = True

    def __init__(self, command: str, timeout_s: float) -> None:
        self.where, self._timeout_s, self._stop = f"pipe:{command}", timeout_s, threading.Event()
        self._command = command if "{}" in command else f"{command}/{{}}"

    def whole(self, name: str) -> bytes:
        """See `Storage`."""
        return b"".join(self.chunks(name, None))

    def chunks(self, name: str, size: int | None) -> Iterator[bytes]:
        """The bytes of a file, in order."""
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
        """What the command writes next; nothing at its end."""
        end = time.monotonic() + self._timeout_s
        while not select.select([descriptor], [], [], _POLL_S)[0]:
            if self._stop.is_set() or TOLD.is_set():
                raise Stopped(f"pipe:{command}: reading was interrupted")
            if time.monotonic() > end:
                raise StorageError(f"pipe:{command}: wrote nothing for {self._timeout_s:g} s (storage.timeout_s)")
        return os.read(descriptor, _CHUNK)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`: never called, for these files are always cached."""
        raise NotImplementedError

    def mapped(self, name: str) -> None:
        """See `Storage`."""

    def local_path(self, name: str) -> Path | None:
        """See `Storage`."""
        return None

    def fetch_ahead(self, now: Sequence[str], soon: Sequence[str]) -> None:
        """See `Storage`: nothing is kept here."""

    def interrupt(self, stop: bool) -> None:
        """See `Storage`."""
        if stop:
            self._stop.set()
        else:
            self._stop.clear()

    def renew(self, name: str) -> bool:
        """See `Storage`."""
        return True


def _options(scheme: str, config: StorageConfig) -> dict[str, Any]:
    """The file system's options with this project's timeouts; retries are made here, visibly, not in the libraries."""
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
    """A client without a limit of connections, which is 100 otherwise: what reads has its own (REQUESTS)."""
    import aiohttp  # takes long to import; most corpora are local

    return aiohttp.ClientSession(**({"connector": aiohttp.TCPConnector(limit=0)} | options))


def _from_environment(name: str, value: Any) -> Any:
    """An option's value; one that is written $NAME stands in the environment."""
    if isinstance(value, dict):
        return {inner: _from_environment(f"{name}.{inner}", each) for inner, each in value.items()}
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    if value[1:] not in os.environ:
        raise StorageError(f"storage.options.{name}: the environment variable {value[1:]} is not set")
    return os.environ[value[1:]]
