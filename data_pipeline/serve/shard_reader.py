"""Random access to one shard: reads a run of a document's tokens, compared with their CRCs before they are used.

In a local file, every block of 8192 tokens is checked once while the shard is open, together with a few neighbours.
Over a network, blocks are checked at every read. The index is read when the shard is first used. `runs` reads many runs
of many shards at once, from packed files if there are any, and leaves to this module all that it finds wrong. This
module reads tars. Of packed files it only reads the CRCs, and names their damaged blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
from isal import isal_zlib

from data_pipeline.format.damage import locate_changed_byte
from data_pipeline.format.packed import packed_name, parse_tail, tail_bytes
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import CRC_BLOCK, ShardError, ShardIndex
from data_pipeline.serve.layout import DocumentLayout
from data_pipeline.store.base import Storage, read_whole

_log = logging.getLogger(__name__)
_TAR_BLOCK = 512  # members of a tar begin at multiples of it
_CHECKED_TOGETHER = 8  # blocks: about as much as the kernel reads ahead anyway


class _ChangedError(ShardError):
    """Bytes that differ from what was written."""


class ShardReader:
    """Reads one shard and its index from a storage."""

    def __init__(self, storage: Storage, info: ShardInfo, dtype: np.dtype) -> None:
        self.info = info
        self.where = f"{storage.where}/{info.file}"
        self._storage = storage
        self._dtype = dtype
        self._itemsize = dtype.itemsize

    @cached_property
    def layout(self) -> DocumentLayout:
        """Where the shard's documents lie. The index is read at the first use, unless the layout was set."""
        return DocumentLayout.of(self.read_index())

    def read_index(self) -> ShardIndex:
        """Return the shard's index. Raises ShardError when it is damaged or belongs to another shard."""
        where = f"{self._storage.where}/{self.info.index}"
        index = self._index_from_file(where)
        of_this_shard = index.tar_sha256 == self.info.sha256 and index.tar_bytes == self.info.bytes
        if not of_this_shard or len(index.lengths) != self.info.documents or index.dtype != self._dtype:
            raise ShardError(f"{where}: the index of another shard, not of {self.info.file}; copy it again")
        return index

    def packed_crc(self) -> np.ndarray | None:
        """Return (blocks,) CRCs of the shard's packed file; None if there is no such file.

        Raises ShardError when the file is damaged.
        """
        name = packed_name(self.info.file)
        path = self._storage.local_path(name)
        if path is None or not path.exists():
            return None
        where = f"{self._storage.where}/{name}"
        tail = tail_bytes(self.info)
        expected = self.info.tokens * self._itemsize + tail
        found = path.stat().st_size
        if found != expected:
            raise ShardError(f"{where}: {found} bytes, expected {expected}")
        data = memoryview(bytearray(tail))
        self._storage.read_into(name, expected - tail, data)
        return parse_tail(data, where, self.info)

    def check_packed(self, blocks: list[int]) -> None:
        """Raise ShardError, naming the byte, when one of these blocks of the packed file is damaged or unreadable."""
        name = packed_name(self.info.file)
        step = CRC_BLOCK * self._itemsize
        crc = self.packed_crc()
        if crc is None:
            return
        for block in blocks:
            begin = block * step
            stop = min((block + 1) * step, self.info.tokens * self._itemsize)
            data = memoryview(bytearray(stop - begin))
            self._storage.read_into(name, begin, data)
            if isal_zlib.crc32(data) != int(crc[block]):
                raise _ChangedError(f"{self._storage.where}/{name}: {_describe(data, int(crc[block]), begin)}")

    def read_into(self, document: int, start: int, buffer: memoryview) -> None:
        """Fill `buffer`, the bytes of at least one whole token, with tokens of the shard's document from `start` on.

        Raises ShardError, naming the shard, the member and the byte, when they are missing or differ from what was
        written.
        """
        layout, size = self.layout, self._itemsize
        first = start // CRC_BLOCK
        last = (start + len(buffer) // size - 1) // CRC_BLOCK
        block = int(layout.crc_starts[document]) + first
        verified = layout.verified[block : block + last - first + 1]
        if not self._storage.remote and not verified.all():
            self._check_around(document, first, last)
        if verified.all():
            offset = int(layout.offsets[document]) + start * size
            self._storage.read_into(self.info.file, offset, buffer)
            return
        data = self._good_blocks(document, first, last)
        skipped = (start - first * CRC_BLOCK) * size
        buffer[:] = data[skipped : skipped + len(buffer)]

    def document_info(self, document: int) -> dict[str, Any]:
        """Return the document's JSON."""
        return self._members(document)[1]

    def check_size(self) -> None:
        """Raise ShardError when the shard should be a local file, but is missing or has the wrong size."""
        path = self._storage.local_path(self.info.file)
        if path is None:
            return
        try:
            size = path.stat().st_size  # one question to the file system, not two
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(f"{path}: the shard is missing; copy it again, or prepare the corpus again") from None
        if size != self.info.bytes:
            raise ShardError(f"{path}: {size} bytes, expected {self.info.bytes}: cut short or replaced; copy it again")

    def _index_from_file(self, where: str) -> ShardIndex:
        try:
            data = read_whole(self._storage, self.info.index, self.info.index_sha256)
        except FileNotFoundError:
            path = self._storage.local_path(self.info.file)
            if path is None:
                raise ShardError(f"{where}: the index is missing; copy it again") from None
            _log.warning("%s: the index is missing; reading all of %s to make it", where, self.info.file)
            return ShardIndex.build(path)
        try:
            index = ShardIndex.from_bytes(data, where)
            if hashlib.sha256(data).hexdigest() != self.info.index_sha256:
                raise ShardError(f"{where}: not the index this corpus was made with; copy it again")
        except ShardError as error:
            return self._made_again(error)
        return index

    def _made_again(self, damage: ShardError) -> ShardIndex:
        """Return an index built from the tar, in place of a damaged one.

        Raises `damage` if its hash is not the right one.
        """
        path = self._storage.local_path(self.info.file)
        if path is None or not path.exists():
            raise damage
        _log.warning("%s; reading all of %s to make it again", damage, self.info.file)
        with contextlib.suppress(ShardError):
            index = ShardIndex.build(path)
            if hashlib.sha256(index.to_bytes()).hexdigest() == self.info.index_sha256:
                return index
        raise damage

    def _check_around(self, document: int, first: int, last: int) -> None:
        """Check these blocks of a document and their neighbours.

        Good blocks are not checked again while the shard is open. Bad or missing blocks are ignored here. They are
        found, and named, when they are read.
        """
        first -= first % _CHECKED_TOGETHER
        last += _CHECKED_TOGETHER - 1 - last % _CHECKED_TOGETHER
        with contextlib.suppress(ShardError):
            begin, size = self._span(document, first, last)
            data = memoryview(np.empty(size, np.uint8))
            self._storage.read_into(self.info.file, begin, data)
            for number, found in self._numbered(document, first, data):
                self.layout.verified[number] = isal_zlib.crc32(found) == self.layout.crc[number]

    def _good_blocks(self, document: int, first: int, last: int) -> memoryview:
        """Return `_read_blocks`, which is called again while another read may give good bytes."""
        for attempt in count(1):
            try:
                return self._read_blocks(document, first, last)
            except _ChangedError:
                if not self._storage.renew(self.info.file, attempt):
                    raise
        raise AssertionError("unreachable")

    def _read_blocks(self, document: int, first: int, last: int) -> memoryview:
        """Return the bytes of these blocks of a document, compared with their CRCs."""
        begin, size = self._span(document, first, last)
        data = memoryview(np.empty(size, np.uint8))
        self._storage.read_into(self.info.file, begin, data)
        for number, found in self._numbered(document, first, data):
            expected = int(self.layout.crc[number])
            if isal_zlib.crc32(found) != expected:
                what = _describe(found, expected, begin)
                raise _ChangedError(f"{self.where}: {self._member_name(document)}: {what}; copy the shard again")
            begin += len(found)
        return data

    def _span(self, document: int, first: int, last: int) -> tuple[int, int]:
        """Return (offset in the shard, size in bytes) of these blocks of a document, up to its end."""
        begin = first * CRC_BLOCK
        stop = min((last + 1) * CRC_BLOCK, int(self.layout.lengths[document]))
        return int(self.layout.offsets[document]) + begin * self._itemsize, (stop - begin) * self._itemsize

    def _numbered(self, document: int, first: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield the blocks in `data`, from a document's block `first` on, each with its place among the CRCs."""
        step = CRC_BLOCK * self._itemsize
        number = int(self.layout.crc_starts[document]) + first
        for place in range(0, len(data), step):
            yield number, data[place : place + step]
            number += 1

    def _member_name(self, document: int) -> str:
        """Return the name of the document's tokens in the tar, if it is still readable."""
        try:
            return self._members(document)[0]
        except (ShardError, tarfile.TarError, ValueError, OSError):
            return f"document {document} of the shard"

    def _members(self, document: int) -> tuple[str, dict[str, Any]]:
        """Return (name of the tokens' member, the JSON before it).

        The tar is read from the end of the previous document.
        """
        offsets, begin = self.layout.offsets, 0
        if document:
            end = int(offsets[document - 1]) + int(self.layout.lengths[document - 1]) * self._itemsize
            begin = -(-end // _TAR_BLOCK) * _TAR_BLOCK
        region = bytearray(int(offsets[document]) - begin)
        self._storage.read_into(self.info.file, begin, memoryview(region))
        with tarfile.open(fileobj=io.BytesIO(region), mode="r|") as tar:
            header = tar.next()
            payload = tar.extractfile(header) if header else None
            info = json.load(payload) if payload else {}
            tokens = tar.next()
        return (tokens.name if tokens else f"document {document} of the shard"), info


def _describe(found: memoryview, expected: int, begin: int) -> str:
    """Describe what is wrong with the bytes of a block that begins at byte `begin` of the shard."""
    changed = locate_changed_byte(found, expected)
    if changed is None:
        return f"bytes {begin} to {begin + len(found) - 1} are not what was written"
    place, written = changed
    return f"byte {begin + place} is 0x{found[place]:02x} where 0x{written:02x} was written"
