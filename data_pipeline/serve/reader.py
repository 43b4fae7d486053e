"""Random access to a prepared corpus: any run of any document's tokens, checked against what was written.

Only the lengths of the documents are held in memory from the start, so that opening ten million costs little.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from bst_base.errors import UserError
from data_pipeline.format.manifest import MANIFEST, Manifest
from data_pipeline.format.tokenizer import Tokenizer, parse_tokenizer
from data_pipeline.serve.shard_reader import ShardReader
from data_pipeline.store.base import Storage, StorageConfig
from data_pipeline.store.cache import CachedStorage
from data_pipeline.store.storage import open_storage


class NoCorpusError(UserError):
    """There is no corpus where one was looked for."""


class Corpus:
    """One split of a prepared corpus; documents are numbered in the order of the manifest's shards.

    Reads may be made from several threads.
    """

    def __init__(self, storage: Storage, manifest: Manifest, split: str) -> None:
        self.storage = storage
        self.manifest = manifest
        self.split = split
        self.where = f"{storage.where} ({split})"
        self.dtype = manifest.token_dtype
        self._shards = [ShardReader(storage, info, self.dtype) for info in manifest.shards(split)]
        counts = [shard.info.documents for shard in self._shards]
        self._starts = [0, *accumulate(counts)]  # each shard's first document
        self.lengths = np.empty(self._starts[-1], np.uint32)
        """(n,) tokens of each document, the end-of-document token included; uint64 where one has 2^32 or more."""
        for shard, start, stop in zip(self._shards, self._starts, self._starts[1:], strict=False):
            lengths = shard.read_index().lengths
            if len(lengths) and lengths.max() > np.iinfo(self.lengths.dtype).max:
                self.lengths = self.lengths.astype(np.uint64)
            self.lengths[start:stop] = lengths
        if not len(self.lengths):
            raise UserError(f"{self.where}: the split is empty; prepare it from more text, or choose another")

    @classmethod
    def open(cls, url: str, split: str = "train", storage: StorageConfig | None = None) -> Corpus:
        """Open a split of the corpus in a directory or at an address (`storage.open_storage`).

        Raises NoCorpusError when there is none, UserError when the split is missing or empty, the tokenizer is missing
        or another one, an index does not belong to its shard, or the store cannot be reached.
        """
        config = storage or StorageConfig()
        source = open_storage(url, config)
        try:
            manifest = Manifest.from_bytes(source.whole(MANIFEST), f"{url}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError):
            raise NoCorpusError(
                f"{url}: no prepared corpus there (looked in {_absolute(source.where)} for {MANIFEST}); make one with "
                "'bst data prepare'"
            ) from None
        files = _files(manifest, split, url)
        if source.remote and config.cache_dir:
            source = CachedStorage(source, config.cache_dir, files)
        corpus = cls(source, manifest, split)
        corpus.tokenizer()
        return corpus

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest: the corpus's identity."""
        return self.manifest.sha256

    @property
    def remote(self) -> bool:
        """Whether tokens come over a network, so that many reads had better go out at a time."""
        return self.storage.remote

    @property
    def tokens_total(self) -> int:
        """Tokens of the split."""
        return int(self.lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        """Documents of the split."""
        return len(self.lengths)

    def tokenizer(self) -> Tokenizer:
        """The corpus's tokenizer; raises UserError when it is missing or not the one the corpus was made with."""
        info = self.manifest.tokenizer
        where = f"{self.storage.where}/{info.file}"
        try:
            tokenizer = parse_tokenizer(self.storage.whole(info.file), where)
        except FileNotFoundError:
            raise UserError(f"{where}: the tokenizer is missing; copy it from where the corpus was prepared") from None
        if tokenizer.sha256 != info.sha256:
            raise UserError(f"{where}: not the tokenizer this corpus was made with; copy it from there")
        return tokenizer

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: bytes of text that each id stands for; 0 for begin, end and padding."""
        return self.tokenizer().token_bytes

    def require_vocabulary(self, size: int) -> None:
        """Raise UserError unless a model of `size` ids can read every token of this corpus."""
        own = self.manifest.tokenizer.vocab_size
        if own > size:
            raise UserError(
                f"{self.where}: its tokenizer has {own} ids, the model only {size}; "
                "raise the model's vocabulary, or prepare the corpus with the model's tokenizer (tokenizer.reuse)"
            )

    def document(self, number: int) -> np.ndarray:
        """All tokens of a document, (n,)."""
        return self.tokens(number, 0, int(self.lengths[number]))

    def tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start..stop`` of a document, in the corpus's dtype; raises ShardError when they are damaged."""
        if not 0 <= start <= stop <= self.lengths[number]:
            raise IndexError(f"{self.where}: document {number} has {self.lengths[number]} tokens, not {start}..{stop}")
        out = np.empty(stop - start, self.dtype)
        if stop > start:
            self.read_into(number, start, memoryview(out).cast("B"))
        return out

    def read_into(self, number: int, start: int, buffer: memoryview) -> None:
        """Fill `buffer`, bytes of at least one whole token, with a document's tokens from `start` on.

        The caller sees to it that the document has them; raises ShardError when they are damaged.
        """
        shard = bisect_right(self._starts, number) - 1
        self._shards[shard].read_into(number - self._starts[shard], start, buffer)

    def document_info(self, number: int) -> dict[str, Any]:
        """The document's JSON: id, path, source, licence and what else `prepare` recorded."""
        shard = bisect_right(self._starts, number) - 1
        return self._shards[shard].document_info(number - self._starts[shard])

    def interrupt(self, stop: bool) -> None:
        """While `stop` is true, reads that wait for a network end with a StorageError."""
        self.storage.interrupt(stop)

    def check_shards(self) -> None:
        """Raise ShardError for the first shard that is missing or of another size; local files only."""
        for shard in self._shards:
            shard.check_size()


def _absolute(where: str) -> str:
    """A directory by its whole path; an address as it is."""
    return where if "://" in where or where.startswith("pipe:") else str(Path(where).absolute())


def _files(manifest: Manifest, split: str, where: str) -> dict[str, tuple[int | None, str]]:
    """(bytes where known, SHA-256) of the files that serving a split needs, by name."""
    files: dict[str, tuple[int | None, str]] = {manifest.tokenizer.file: (None, manifest.tokenizer.sha256)}
    for shard in manifest.shards(split):
        files[shard.file] = (shard.bytes, shard.sha256)
        files[shard.index] = (None, shard.index_sha256)
    for name in files:
        if PurePath(name).name != name:  # a manifest from afar must not name files outside the corpus or the cache
            raise UserError(
                f"{where}/{MANIFEST}: {name!r} is not a plain file name: this manifest is not to be trusted"
            )
    return files
