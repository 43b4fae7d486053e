"""A corpus that continues an earlier one: it keeps the earlier shards, and adds new documents in shards after them.

The documents of the earlier corpus are identified by their ids, which its indexes hold: an id is a hash of a document's
path and text. So nothing has to be stored in addition to a corpus, and any corpus can be continued. Documents that were
appended to an existing file are found like those of a new file. The whole source is read, to find the new documents.
Documents that are already there are not tokenized or written again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bst_base.errors import UserError
from bst_base.files import atomic_file
from data_pipeline.format.extents import shard_extents
from data_pipeline.format.manifest import Manifest, sha256_file
from data_pipeline.format.packed import packed_name
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import ShardIndex
from data_pipeline.format.tokenizer import Tokenizer, read_tokenizer
from data_pipeline.prepare.identity import differences
from data_pipeline.prepare.spool import SPLITS

_OF_CONTENT = ("content_sha256", "names_sha256", "parts")  # the fields that may differ after a source has grown


class Earlier:
    """The corpus that is continued."""

    def __init__(self, directory: Path) -> None:
        """Read the corpus. Raises UserError when there is none, or its indexes are not those of its manifest."""
        self.directory, self.manifest = directory, Manifest.read(directory)
        self.extents: dict[str, list[list[int]]] = {}
        """The extents of each shard, by split (`format.extents`)."""
        ids, splits = [np.empty(0, np.uint64)], [np.empty(0, np.uint8)]
        for split, shard in self._shards():
            index = self._index(shard)
            self.extents.setdefault(split, []).append(shard_extents(index.lengths))
            ids.append(index.ids)
            splits.append(np.full(len(index.ids), SPLITS.index(split), np.uint8))
        self.ids, self.splits = np.concatenate(ids), np.concatenate(splits)
        """(documents,) the split of each document. `ids`, (documents,), holds their ids."""

    @property
    def history(self) -> list[str]:
        """The SHA-256 of the manifests of this corpus and of those that it continues, the most recent first."""
        return [self.manifest.sha256, *self.manifest.provenance.get("continues", [])]

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of its shards; raises UserError when it is not the one that the manifest names."""
        info = self.manifest.tokenizer
        return read_tokenizer(self.directory / info.file, info.sha256)

    def require_same(self, wanted: dict[str, Any]) -> None:
        """Raise UserError unless it was made with the settings and from the kind of source in `wanted`."""
        own = {key: self.manifest.provenance.get(key) for key in ("settings", "source")}
        found = [name for name, *_ in differences(own, {key: wanted[key] for key in own})]
        found = [name for name in found if name not in {f"source.{each}" for each in _OF_CONTENT}]
        if found:
            raise UserError(
                f"continues: {self.directory} was prepared with other settings ({', '.join(found)}); only a corpus "
                "with the same settings can be continued"
            )

    def found_in(self, ids: np.ndarray) -> np.ndarray:
        """Return (n,) uint8: the split, in this corpus, of the documents with these ids, (n,); 0 for other documents.

        Raises UserError when a document of this corpus is not among them: it would stay in the new corpus.
        """
        order, own = np.argsort(ids, kind="stable"), np.argsort(self.ids, kind="stable")
        ordered, there = ids[order], self.ids[own]
        # An id may occur several times. Its k-th occurrence in `ids` is matched with the k-th in this corpus.
        place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
        first, last = np.searchsorted(there, ordered), np.searchsorted(there, ordered, side="right")
        here = place < last - first
        if missing := len(self.ids) - int(here.sum()):
            raise UserError(
                f"continues: {missing:,} of the {len(self.ids):,} documents of {self.directory} were removed from the "
                "source or changed: only add documents and keep the earlier ones, or prepare the corpus again "
                "without continues"
            )
        splits = np.zeros(len(ids), np.uint8)
        splits[order[here]] = self.splits[own][(first + place)[here]]
        return splits

    def take_over(self, output: Path) -> None:
        """Put its shards, with indexes and packed files, into `output`: as hard links, or as copies on another disk."""
        for _, shard in self._shards():
            for name in (shard.file, shard.index, packed_name(shard.file)):
                (output / name).unlink(missing_ok=True)
                if (self.directory / name).exists():
                    _link(self.directory / name, output / name)

    def _shards(self) -> Iterator[tuple[str, ShardInfo]]:
        return ((split, shard) for split, shards in self.manifest.splits.items() for shard in shards)

    def _index(self, shard: ShardInfo) -> ShardIndex:
        path, tar = self.directory / shard.index, self.directory / shard.file
        for file in (path, tar):
            if not file.is_file():
                raise UserError(f"{file}: missing; copy it there again")
        if sha256_file(path) != shard.index_sha256 or tar.stat().st_size != shard.bytes:
            raise UserError(f"{self.directory}: {shard.file} or its index is damaged; see 'bst data verify'")
        return ShardIndex.read(path)


def _link(source: Path, target: Path) -> None:
    with suppress(OSError):
        os.link(source, target)
        return
    with source.open("rb") as file, atomic_file(target) as copy:
        shutil.copyfileobj(file, copy)
