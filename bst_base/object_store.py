"""Files in an object store, accessed through fsspec. Errors name the file and hide the secrets of the address."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fsspec

from bst_base.addresses import filled, redacted
from bst_base.errors import StorageError, UserError

T = TypeVar("T")


class ObjectStore:
    """The files below an address that fsspec supports: ``s3://bucket/path``, ``gs://…``, ``file:///…``.

    The store's client reads credentials and endpoints from its usual places (for S3 the AWS_… variables), or fsspec
    from the FSSPEC_… variables. A password in the address may be given as the name of an environment variable, `$NAME`.
    Methods raise StorageError, naming the file, when the store reports an error. Several threads may call them.
    """

    def __init__(self, url: str) -> None:
        if "://" not in url:
            raise UserError(f"{url}: not an address of an object store: s3://bucket/path, gs://…, or file:///path")
        full, self._hidden = filled(url.rstrip("/"))
        self.where = redacted(url.rstrip("/"))
        """The address as it is shown, without a password."""
        if "::" in full:
            raise UserError(f"{self.where}: has '::', which fsspec takes for two addresses: choose another address")
        try:
            options = {"auto_mkdir": True} if full.startswith("file:") else {}
            self._fs, self._root = fsspec.url_to_fs(full, **options)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.where}: {self._said(error)}") from None
        if found := re.search(r"[*?\[]", self._root):  # also when it removes files
            raise UserError(f"{self.where}: has {found[0]!r}, which fsspec takes for a pattern: choose another address")

    def read(self, name: str) -> bytes | None:
        """Return a file's content; None if it is not there."""
        return self._unless_missing(name, "read", lambda: self._fs.cat_file(self._at(name)))

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, asked anew; None if it is not there."""
        self._fs.invalidate_cache()
        return self._unless_missing(name, "look for", lambda: int(self._fs.info(self._at(name))["size"]))

    def names(self, pattern: str) -> list[str]:
        """Return the names of the files that match `pattern`, relative to the address."""
        self._fs.invalidate_cache()
        found = self._told(pattern, "list", lambda: self._fs.glob(self._at(pattern), detail=True))
        return [name.removeprefix(f"{self._root}/") for name, info in found.items() if info["type"] == "file"]

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._told(name, "write", lambda: self._fs.pipe_file(self._at(name), data))

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        self._told(name, "write", lambda: self._fs.put_file(str(path), self._at(name)))

    def download(self, name: str, path: Path) -> None:
        """Copy a file of the store to a local path."""
        self._told(name, "read", lambda: self._fs.get_file(self._at(name), str(path)))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._told(name, "remove", lambda: self._fs.rm_file(self._at(name)))

    def remove_below(self, name: str) -> None:
        """Remove everything below a name."""
        self._told(name, "remove", lambda: self._fs.rm(self._at(name), recursive=True))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _unless_missing(self, name: str, doing: str, work: Callable[[], T]) -> T | None:
        def look() -> T | None:
            try:
                return work()
            except FileNotFoundError:
                return None

        return self._told(name, doing, look)

    def _told(self, name: str, doing: str, work: Callable[[], T]) -> T:
        """Return the result of `work`; turn any exception of the store's client into a StorageError."""
        try:
            return work()
        except Exception as error:  # every client has its own exception types
            reason = f"{type(error).__name__}: {self._said(error)}".rstrip(": ")
            raise StorageError(f"{self.where}/{name}: cannot {doing}: {reason}") from None

    def _said(self, error: Exception) -> str:
        """Return an error's message without the secrets of the address."""
        text = str(error)
        for secret, name in self._hidden.items():
            text = text.replace(secret, name)
        return text
