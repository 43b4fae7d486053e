"""Uploads a prepared corpus to an object store: its files first, each compared with its SHA-256, the manifest last.

A store has no atomic rename. So files without a manifest are not a corpus, and an interrupted push continues where it
stopped. During a push, `pushing.json` in the store names the corpus that the files belong to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import fsspec

from bst_base.addresses import filled, redacted
from bst_base.errors import StorageError, UserError
from data_pipeline.format.manifest import MANIFEST, Manifest, sha256_file

UNDER_WAY = "pushing.json"
SKIPPED = "skipped.jsonl"
_TRANSFERS = 8  # files uploaded in parallel

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (bytes done, total bytes)."""


class File(NamedTuple):
    """A file of a corpus."""

    name: str
    sha256: str | None
    """None: the manifest does not contain it."""


class Sent(NamedTuple):
    """The result of a push."""

    files: int
    bytes: int
    already_there: int
    """Files that were not sent because they are there already."""


def push(corpus: Path, url: str, grow: bool, progress: Progress) -> Sent:
    """Upload a corpus to an address that fsspec knows. Files that are already there are not sent again.

    `grow`: replace a corpus there that this one continues; only the new files are sent. Raises UserError when another
    corpus is there or a file does not match the manifest, and StorageError when the store reports an error.
    """
    manifest, target = Manifest.read(corpus), _Target(url)
    there = target.manifest()
    if there is not None and there.sha256 == manifest.sha256:
        return Sent(0, 0, len(list(_files(corpus, manifest))) + 1)
    _require_free(target, there, manifest, grow)
    complete = set() if there is None else {(file.name, file.sha256) for file in _files(corpus, there)}
    if target.under_way() == manifest.sha256:
        complete |= {(file.name, file.sha256) for file in _files(corpus, manifest)}
    else:
        target.put_bytes(UNDER_WAY, json.dumps({"manifest_sha256": manifest.sha256}).encode())
    files = list(_files(corpus, manifest))
    sizes = {file.name: _size(corpus / file.name) for file in files}
    waiting = [
        file
        for file in files
        if file.sha256 is None or (file.name, file.sha256) not in complete or target.size(file.name) != sizes[file.name]
    ]
    total, done = sum(sizes[file.name] for file in waiting), 0
    progress(0, total)
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        try:
            for file, _ in zip(waiting, pool.map(lambda file: target.put(corpus, file), waiting), strict=True):
                done += sizes[file.name]
                progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    target.put_bytes(MANIFEST, manifest.to_bytes())
    target.remove(UNDER_WAY)
    return Sent(len(waiting) + 1, total + len(manifest.to_bytes()), len(files) - len(waiting))


def _require_free(target: _Target, there: Manifest | None, manifest: Manifest, grow: bool) -> None:
    if there is None or (grow and there.sha256 in manifest.provenance.get("continues", [])):
        return
    if there.sha256 in manifest.provenance.get("continues", []):
        raise UserError(
            f"{target.where} holds the corpus that this one continues: with --grow the new files alone are sent and "
            "the manifest is replaced (a run on the corpus there can then not be resumed from there); or push to "
            "another address"
        )
    raise UserError(f"{target.where} holds another corpus ({there.sha256[:12]}…): push to another address")


def _files(corpus: Path, manifest: Manifest) -> Iterator[File]:
    """Yield all files of a corpus except its manifest; shards first, since they take longest."""
    for shards in manifest.splits.values():
        for shard in shards:
            yield File(shard.file, shard.sha256)
            yield File(shard.index, shard.index_sha256)
    for extents in (manifest.extents or {}).values():
        yield File(extents.file, extents.sha256)
    yield File(manifest.tokenizer.file, manifest.tokenizer.sha256)
    if (corpus / SKIPPED).exists():
        yield File(SKIPPED, None)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: missing; copy it there again, or prepare the corpus again") from None


class _Target:
    """The address that a corpus is uploaded to."""

    def __init__(self, url: str) -> None:
        if "://" not in url:
            raise UserError(f"{url}: not an address: s3://bucket/corpus, gs://…, or file:///path")
        full, self._hidden = filled(url.rstrip("/"))
        self.where = redacted(url.rstrip("/"))
        try:
            options = {"auto_mkdir": True} if url.startswith("file:") else {}
            self._fs, self._root = fsspec.url_to_fs(full, **options)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.where}: {error}") from None

    def manifest(self) -> Manifest | None:
        """Return the manifest of the corpus there; None if there is none."""
        data = self._read(MANIFEST)
        return None if data is None else Manifest.from_bytes(data, f"{self.where}/{MANIFEST}")

    def under_way(self) -> str | None:
        """Return the manifest's SHA-256 of the interrupted push there; None if there is none."""
        data = self._read(UNDER_WAY)
        return None if data is None else json.loads(data)["manifest_sha256"]

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None if it is not there."""
        try:
            return int(self._fs.info(self._at(name))["size"])
        except FileNotFoundError:
            return None
        except Exception as error:  # every client has its own exception types
            raise self._error(name, "look for", error) from None

    def put(self, corpus: Path, file: File) -> None:
        """Upload a file.

        Raises UserError for a file that does not match the manifest, so that damage does not spread.
        """
        path = corpus / file.name
        if file.sha256 is not None and sha256_file(path) != file.sha256:
            raise UserError(f"{path}: not what the manifest says; nothing more is sent; see 'bst data verify {corpus}'")
        self._told(file.name, "write", lambda: self._fs.put_file(str(path), self._at(file.name)))
        self._fs.invalidate_cache()
        if (size := self.size(file.name)) != path.stat().st_size:
            raise StorageError(
                f"{self.where}/{file.name}: {size} bytes arrived of {path.stat().st_size}; push it again"
            )

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._told(name, "write", lambda: self._fs.pipe_file(self._at(name), data))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._told(name, "remove", lambda: self._fs.rm_file(self._at(name)))

    def _read(self, name: str) -> bytes | None:
        try:
            return self._fs.cat_file(self._at(name))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._error(name, "read", error) from None

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _told(self, name: str, doing: str, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            raise self._error(name, doing, error) from None

    def _error(self, name: str, doing: str, error: Exception) -> StorageError:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        for secret, hidden in self._hidden.items():
            reason = reason.replace(secret, hidden)
        return StorageError(f"{self.where}/{name}: cannot {doing}: {reason}")
