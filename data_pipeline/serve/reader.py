"""Random access to a prepared corpus: any run of tokens of any document, checked against its CRCs.

Opening a corpus reads its manifest and its tokenizer, but no index. A shard is opened when it is first read.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from bst_base.errors import UserError
from data_pipeline.format.extents import ShardSizes, extents, from_bytes
from data_pipeline.format.manifest import MANIFEST, Manifest
from data_pipeline.format.packed import packed_name
from data_pipeline.format.shards import ShardError
from data_pipeline.format.tokenizer import Tokenizer, parse_tokenizer
from data_pipeline.serve.layout import DocumentLayout, Found, OpenShards
from data_pipeline.serve.shard_reader import ShardReader
from data_pipeline.store.base import Storage, StorageConfig, read_whole
from data_pipeline.store.cache import CachedStorage
from data_pipeline.store.heap import trim_heap
from data_pipeline.store.mapped import MappedFile
from data_pipeline.store.storage import open_storage

_log = logging.getLogger(__name__)
_KEPT = 1 << 20  # a corpus of at most so many documents keeps all its indexes open once they are read: 30 MB
_INDEXES_AT_ONCE = 32  # indexes fetched in parallel over a network: latency takes much longer than the transfer
_CHECKED_AT_START = 1000  # shards whose size is checked at the start


class NoCorpusError(UserError):
    """There is no prepared corpus at the given place."""


class Corpus:
    """One split of a prepared corpus. Documents are numbered in the order of the manifest's shards.

    Several threads may read at the same time.
    """

    def __init__(self, storage: Storage, manifest: Manifest, split: str, sha256: str | None = None) -> None:
        self.storage = storage
        self.manifest = manifest
        self.split = split
        self.where = f"{storage.where} ({split})"
        self.dtype = manifest.token_dtype
        self.sha256 = sha256 or manifest.sha256
        """SHA-256 of the manifest. It identifies the corpus."""
        self._table = manifest.shards(split)
        self.first_documents = np.append(0, np.cumsum(self._table.column("documents")))
        """(shards + 1,) int64: the number of each shard's first document, then the number of all documents."""
        self._firsts = memoryview(self.first_documents)
        self._open = OpenShards(len(self._table), self.first_documents)
        self._readers: dict[int, ShardReader] = {}  # of open shards
        # Of open shards only: a copy that a cache has removed takes disk space as long as it is mapped.
        self._maps: dict[tuple[int, bool], MappedFile] = {}
        self._unpacked: set[int] = set()  # shards whose packed files are damaged and not used
        self._sizes = lru_cache(maxsize=4)(self._measure)
        if not len(self):
            raise UserError(f"{self.where}: the split is empty; prepare it from more text, or choose another")

    @classmethod
    def open(cls, url: str, split: str = "train", storage: StorageConfig | None = None) -> Corpus:
        """Open a split of the corpus in a directory or at an address (`storage.open_storage`).

        Raises NoCorpusError when there is no corpus. Raises UserError when the split is missing or empty, when the
        tokenizer is missing or a different one, or when the store cannot be reached.
        """
        config = storage or StorageConfig()
        source = open_storage(url, config)
        try:
            data = source.whole(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise NoCorpusError(
                f"{url}: no prepared corpus there (looked in {_absolute(source.where)} for {MANIFEST}); make one with "
                "'bst data prepare'"
            ) from None
        sha256 = hashlib.sha256(data).hexdigest()
        manifest = Manifest.from_bytes(data, f"{url}/{MANIFEST}")
        size = len(data)
        del data  # 40 MB for 100,000 shards
        trim_heap(size)
        files = KnownFiles(manifest, split, f"{url}/{MANIFEST}")
        if source.remote and config.cache_dir:
            source = CachedStorage(source, config.cache_dir, files, config.cache_bytes)
        corpus = cls(source, manifest, split, sha256)
        corpus.tokenizer()
        return corpus

    @property
    def remote(self) -> bool:
        """Whether tokens come over a network, so that many reads in parallel are faster."""
        return self.storage.remote

    @property
    def tokens_total(self) -> int:
        """Number of tokens of the split."""
        return self.manifest.tokens(self.split)

    def __len__(self) -> int:
        """Return the number of documents of the split."""
        return int(self.first_documents[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each document, with its end token; uint64 when a document has 2^32 or more, else uint32.

        It reads every index. Serving version 3 of the order does not need it.
        """
        every = np.arange(len(self._table))
        if len(self) <= _KEPT:
            return self._opened(every).lengths
        lengths = np.empty(len(self), np.uint32)
        for shard, found in zip(every.tolist(), self._each_layout(every), strict=True):
            if found.lengths.dtype != np.uint32:
                lengths = lengths.astype(np.uint64)
            lengths[self._firsts[shard] : self._firsts[shard + 1]] = found.lengths
        return lengths

    def tokenizer(self) -> Tokenizer:
        """Return the corpus's tokenizer.

        Raises UserError when it is missing, or not the tokenizer that the corpus was made with.
        """
        info = self.manifest.tokenizer
        where = f"{self.storage.where}/{info.file}"
        try:
            tokenizer = parse_tokenizer(read_whole(self.storage, info.file, info.sha256), where)
        except FileNotFoundError:
            raise UserError(f"{where}: the tokenizer is missing; copy it from where the corpus was prepared") from None
        if tokenizer.sha256 != info.sha256:
            raise UserError(f"{where}: not the tokenizer this corpus was made with; copy it from there")
        return tokenizer

    def token_bytes(self) -> np.ndarray:
        """Return (V,) int64: the bytes of text of each id; 0 for begin, end and padding."""
        return self.tokenizer().token_bytes

    def require_vocabulary(self, size: int) -> None:
        """Raise UserError unless a model with `size` ids can read every token of this corpus."""
        own = self.manifest.tokenizer.vocab_size
        if own > size:
            raise UserError(
                f"{self.where}: its tokenizer has {own} ids, the model only {size}; "
                "raise the model's vocabulary, or prepare the corpus with the model's tokenizer (tokenizer.reuse)"
            )

    def shard_sizes(self, block: int | None) -> ShardSizes:
        """Return the shard sizes that the order needs. `block` is W for isolated documents, None for joined ones."""
        return self._sizes(block)

    def shard_lengths(self, shards: np.ndarray) -> np.ndarray:
        """Return (n,) tokens of each document of these shards, in increasing order; they stay open until released."""
        return self._opened(shards).lengths

    @property
    def open_shards(self) -> int:
        """How many shards have their index in memory."""
        return len(self._open)

    def find(self, documents: np.ndarray) -> list[Found]:
        """Locate documents (m,); return one `Found` for each set of shards that were opened together."""
        shards = np.searchsorted(self.first_documents, documents, side="right") - 1
        while not isinstance(found := self._open.find(documents, shards), list):
            self._opened(found)
        return found

    def mapped(self, shard: int, packed: bool) -> MappedFile | None:
        """Return the memory-mapped tar or packed file of a shard. It stays mapped until the shard is released.

        Returns None when it cannot be mapped; a normal read then raises the error that says why.
        """
        file = self._maps.get((shard, packed))
        if file is None:
            name = self._table.column("file")[shard].decode()
            with suppress(UserError):
                file = self.storage.mapped(packed_name(name) if packed else name)
            if file is not None:
                self._maps[shard, packed] = file
        return file

    def shard_tokens(self) -> np.ndarray:
        """Return (shards,) int64: the tokens of each shard."""
        return self._table.column("tokens")

    def examine_packed(self, shard: int, blocks: list[int]) -> None:
        """Check these blocks of a shard's packed file; if one is damaged, log it and read the tar from now on."""
        try:
            self._shard(shard).check_packed(blocks)
        except ShardError as error:
            self._leave_packed(shard, error)
            self.release([shard])

    def unmap(self) -> None:
        """Drop all mappings, so that the next reads map the files again: a store may have replaced a damaged one."""
        self._maps.clear()

    def fetch_ahead(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Tell the storage which shards are read from now on, and which come after them."""

        def files(shards: Sequence[int]) -> list[str]:
            infos = [self._table[shard] for shard in shards]
            return [name for info in infos for name in (info.index, info.file)]

        self.storage.fetch_ahead(files(now), files(soon))

    def release(self, shards: Iterable[int]) -> None:
        """Drop the indexes and mappings of these shards. They are opened again at the next read."""
        released = np.fromiter(shards, np.int64)
        self._open.release(released)
        for shard in released.tolist():
            self._readers.pop(shard, None)
            self._maps.pop((shard, False), None)
            self._maps.pop((shard, True), None)

    def document(self, number: int) -> np.ndarray:
        """Return all tokens of a document, (n,)."""
        return self.tokens(number, 0, self._length(number))

    def tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        """Return the tokens ``start..stop`` of a document, in the corpus's dtype; raises ShardError if damaged."""
        if not 0 <= start <= stop <= (length := self._length(number)):
            raise IndexError(f"{self.where}: document {number} has {length} tokens, not {start}..{stop}")
        out = np.empty(stop - start, self.dtype)
        if stop > start:
            self.read_into(number, start, memoryview(out).cast("B"))
        return out

    def read_into(self, number: int, start: int, buffer: memoryview) -> None:
        """Fill `buffer`, the bytes of at least one whole token, with a document's tokens from `start` on.

        The caller must not ask for more tokens than the document has. Raises ShardError when they are damaged.
        """
        shard = bisect_right(self._firsts, number) - 1
        self._reader(shard).read_into(number - self._firsts[shard], start, buffer)

    def document_info(self, number: int) -> dict[str, Any]:
        """Return the document's JSON: id, path, source, licence and all else that `prepare` recorded."""
        shard = bisect_right(self._firsts, number) - 1
        return self._reader(shard).document_info(number - self._firsts[shard])

    def interrupt(self, stop: bool) -> None:
        """Interrupt reads: while `stop` is true, reads that wait for a network raise Stopped."""
        self.storage.interrupt(stop)

    def check_shards(self, checked: slice) -> None:
        """Raise ShardError for the first local shard of `checked` that is missing or has the wrong size.

        Only the first 1000 shards are checked: asking a file system about each of many would delay the start. The ranks
        of a run share these, since all start at the same moment: each gives its own part as `checked`.
        """
        for shard in range(min(len(self._table), _CHECKED_AT_START))[checked]:
            self._shard(shard).check_size()

    def _shard(self, shard: int) -> ShardReader:
        return ShardReader(self.storage, self._table[shard], self.dtype)

    def _reader(self, shard: int) -> ShardReader:
        """Return the reader of a shard's tar. It needs its own layout if the open one is that of the packed file."""
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._shard(shard)
            layout = self._open.part(shard) or self._opened(np.array([shard]))
            if not layout.packed.any():
                reader.layout = layout
            reader = self._readers.setdefault(shard, reader)
        return reader

    def _length(self, number: int) -> int:
        shard = bisect_right(self._firsts, number) - 1
        return int(self._reader(shard).layout.lengths[number - self._firsts[shard]])

    def _opened(self, shards: np.ndarray) -> DocumentLayout:
        """Return the layout of these shards; open them unless they are open together already."""
        layout = self._open.together(shards)
        if layout is None:
            layout = self._open.add(shards, DocumentLayout.join(list(self._each_layout(shards))))
            for shard in shards.tolist():
                self._readers.pop(shard, None)
        return layout

    def _each_layout(self, shards: np.ndarray) -> Iterator[DocumentLayout]:
        """Yield the layout of each shard from its index. Indexes on another machine are fetched in parallel."""

        if self.storage.local_path(MANIFEST) is not None:
            yield from map(self._layout, shards.tolist())
            return
        with ThreadPoolExecutor(min(_INDEXES_AT_ONCE, len(shards))) as pool:
            yield from pool.map(self._layout, shards.tolist())

    def _layout(self, shard: int) -> DocumentLayout:
        """Return where a shard's documents lie: in its packed file if there is an intact one, otherwise in its tar."""
        reader = self._shard(shard)
        crc = None
        if shard not in self._unpacked:
            try:
                crc = reader.packed_crc()
            except ShardError as error:
                self._leave_packed(shard, error)
        return reader.layout if crc is None else DocumentLayout.of_packed(reader.read_index(), crc)

    def _leave_packed(self, shard: int, damage: ShardError) -> None:
        if shard not in self._unpacked:
            self._unpacked.add(shard)
            _log.warning("%s; its tokens are read from %s instead", damage, self._table[shard].file)

    def _measure(self, block: int | None) -> ShardSizes:
        documents, tokens = self._table.column("documents"), self._table.column("tokens")
        if block is None:
            return ShardSizes(documents, tokens, tokens)
        found = self._stored_extents(block)
        if found is None:
            every = np.arange(len(self._table))
            if len(self) <= _KEPT:
                lengths = np.split(self._opened(every).lengths, self.first_documents[1:-1])
            else:
                lengths = (layout.lengths for layout in self._each_layout(every))
            found = np.array([extents(each, block).sum() for each in lengths])
        return ShardSizes(documents, tokens, found)

    def _stored_extents(self, block: int) -> np.ndarray | None:
        """Return (shards,) extents from the corpus's extents file; None when there is no valid file."""
        info = (self.manifest.extents or {}).get(self.split)
        if info is None:
            return None
        try:
            data = read_whole(self.storage, info.file, info.sha256)
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != info.sha256:
            _log.warning("%s/%s: missing or damaged; reading every index instead", self.storage.where, info.file)
            return None
        return from_bytes(data, len(self._table), block)


def _absolute(where: str) -> str:
    """Return the absolute path of a directory; an address as it is."""
    return where if "://" in where or where.startswith("pipe:") else str(Path(where).absolute())


class KnownFiles:
    """The files that serving a split needs, as the manifest names them.

    Raises UserError for a name that is not a plain file name: a downloaded manifest must not name files outside the
    corpus or the cache.
    """

    def __init__(self, manifest: Manifest, split: str, where: str) -> None:
        table = manifest.shards(split)
        self._files: dict[str, tuple[int | None, str]] = {
            manifest.tokenizer.file: (None, manifest.tokenizer.sha256),
            **{info.file: (None, info.sha256) for info in (manifest.extents or {}).values()},
        }
        self._table = table
        self._sorted = {name: np.argsort(table.column(name)) for name in ("file", "index")}
        for name in self._files:
            if PurePath(name).name != name:
                raise _untrusted(where, name)
        for names in (table.column("file"), table.column("index")):
            bad = (np.char.find(names, b"/") >= 0) | np.isin(names, [b"", b".", b".."])
            if bad.any():
                raise _untrusted(where, names[bad][0].decode())

    def __getitem__(self, name: str) -> tuple[int | None, str]:
        """Return (size in bytes or None if unknown, SHA-256) of a file."""
        if name in self._files:
            return self._files[name]
        for kind, order in self._sorted.items():
            column = self._table.column(kind)
            key = name.encode()
            place = int(np.searchsorted(column, key, sorter=order))
            if place < len(order) and column[order[place]] == key:
                shard = self._table[int(order[place])]
                return (shard.bytes, shard.sha256) if kind == "file" else (None, shard.index_sha256)
        raise KeyError(name)


def _untrusted(where: str, name: str) -> UserError:
    return UserError(f"{where}: {name!r} is not a plain file name: this manifest is not to be trusted")
