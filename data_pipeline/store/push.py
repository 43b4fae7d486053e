"""Uploads a prepared corpus to an object store: its files first, each compared with its SHA-256, the manifest last.

A store has no atomic rename. So files without a manifest are not a corpus, and an interrupted push continues where it
stopped. During a push, `pushing.json` in the store names the corpus that the files belong to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bst_base.errors import StorageError, UserError
from bst_base.object_store import ObjectStore
from data_pipeline.format.manifest import MANIFEST, Manifest, sha256_file

UNDER_WAY = "pushing.json"
SKIPPED = "skipped.jsonl"
_TRANSFERS = 8  # files uploaded in parallel

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
        target.store.write(UNDER_WAY, json.dumps({"manifest_sha256": manifest.sha256}).encode())
    files = list(_files(corpus, manifest))
    sizes = {file.name: _size(corpus / file.name) for file in files}
    waiting = [
        file
        for file in files
        if file.sha256 is None
        or (file.name, file.sha256) not in complete
        or target.store.size(file.name) != sizes[file.name]
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
    target.store.write(MANIFEST, manifest.to_bytes())
    target.store.remove(UNDER_WAY)
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
        self.store = ObjectStore(url)
        self.where = self.store.where

    def manifest(self) -> Manifest | None:
        """Return the manifest of the corpus there; None if there is none."""
        data = self.store.read(MANIFEST)
        return None if data is None else Manifest.from_bytes(data, f"{self.where}/{MANIFEST}")

    def under_way(self) -> str | None:
        """Return the manifest's SHA-256 of the interrupted push there; None if there is none."""
        data = self.store.read(UNDER_WAY)
        return None if data is None else json.loads(data)["manifest_sha256"]

    def put(self, corpus: Path, file: File) -> None:
        """Upload a file.

        Raises UserError for a file that does not match the manifest, so that damage does not spread.
        """
        path = corpus / file.name
        if file.sha256 is not None and sha256_file(path) != file.sha256:
            raise UserError(f"{path}: not what the manifest says; nothing more is sent; see 'bst data verify {corpus}'")
        self.store.upload(path, file.name)
        if (size := self.store.size(file.name)) != path.stat().st_size:
            raise StorageError(
                f"{self.where}/{file.name}: {size} bytes arrived of {path.stat().st_size}; push it again"
            )
