"""Random access to one shard: runs of a document's tokens, compared with their CRCs before they are used.

Every block of 8192 tokens is checked once per process where the shard is a local file, and at every read where its
bytes come over a network. The index is read again when the shard is first touched, and what is kept of it is small.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.damage import locate_changed_byte
from data_pipeline.manifest import ShardInfo
from data_pipeline.shards import CRC_BLOCK, ShardError, ShardIndex
from data_pipeline.storage import Storage

_log = logging.getLogger(__name__)
_TAR_BLOCK = 512  # members of a tar begin at multiples of it


class _ChangedError(ShardError):
    """Bytes that are not what was written."""


@dataclass(frozen=True)
class _Layout:
    """What reading needs of a shard's index."""

    offsets: np.ndarray  # (documents,) byte of the first token
    lengths: np.ndarray  # (documents,) tokens
    crc: np.ndarray  # (blocks,)
    crc_starts: np.ndarray  # (documents,) each document's first place in `crc`
    verified: np.ndarray  # (blocks,) bool: found whole in this process


class ShardReader:
    """One shard and its index, in a storage."""

    def __init__(self, storage: Storage, info: ShardInfo, dtype: np.dtype) -> None:
        self.info = info
        self.where = f"{storage.where}/{info.file}"
        self._storage = storage
        self._dtype = dtype

    def read_index(self) -> ShardIndex:
        """The shard's index; raises ShardError when it is damaged or belongs to another shard."""
        where = f"{self._storage.where}/{self.info.index}"
        index = self._index_from_file(where)
        of_this_shard = index.tar_sha256 == self.info.sha256 and index.tar_bytes == self.info.bytes
        if not of_this_shard or len(index.lengths) != self.info.documents or index.dtype != self._dtype:
            raise ShardError(f"{where}: the index of another shard, not of {self.info.file}; copy it again")
        return index

    def read_into(self, document: int, start: int, out: np.ndarray) -> None:
        """Fill `out` (k,), k at least 1, with tokens from `start` on of the shard's document.

        Raises ShardError naming the shard, the member and the byte when they are missing or not what was written.
        """
        layout = self._layout
        first, last = start // CRC_BLOCK, (start + len(out) - 1) // CRC_BLOCK
        crcs = slice(int(layout.crc_starts[document]) + first, int(layout.crc_starts[document]) + last + 1)
        if layout.verified[crcs].all():
            offset = int(layout.offsets[document]) + start * self._dtype.itemsize
            self._storage.read_into(self.info.file, offset, memoryview(out).cast("B"))
            return
        begin = first * CRC_BLOCK
        stop = min((last + 1) * CRC_BLOCK, int(layout.lengths[document]))
        try:
            whole = self._read_blocks(document, begin, stop, layout.crc[crcs])
        except _ChangedError:
            if not self._storage.renew(self.info.file):
                raise
            whole = self._read_blocks(document, begin, stop, layout.crc[crcs])
        layout.verified[crcs] = not self._storage.remote
        out[:] = whole[start - begin : start - begin + len(out)]

    def document_info(self, document: int) -> dict[str, Any]:
        """The document's JSON."""
        return self._members(document)[1]

    def check_size(self) -> None:
        """Raise ShardError when the shard is a local file that is missing or of another size than it was."""
        path = self._storage.local_path(self.info.file)
        if path is None:
            return
        if not path.exists():
            raise ShardError(f"{path}: the shard is missing; copy it again, or prepare the corpus again")
        if (size := path.stat().st_size) != self.info.bytes:
            raise ShardError(f"{path}: {size} bytes, expected {self.info.bytes}: cut short or replaced; copy it again")

    @cached_property
    def _layout(self) -> _Layout:
        index = self.read_index()
        offsets, lengths = index.offsets.astype(np.int64), index.lengths.astype(np.uint32)
        return _Layout(offsets, lengths, index.crc.copy(), index.crc_starts, np.zeros(len(index.crc), bool))

    def _index_from_file(self, where: str) -> ShardIndex:
        try:
            data = self._storage.whole(self.info.index)
        except FileNotFoundError:
            path = self._storage.local_path(self.info.file)
            if path is None:
                raise ShardError(f"{where}: the index is missing; copy it again") from None
            _log.warning("%s: the index is missing; reading all of %s to make it", where, self.info.file)
            return ShardIndex.build(path)
        index = ShardIndex.from_bytes(data, where)
        if hashlib.sha256(data).hexdigest() != self.info.index_sha256:
            raise ShardError(f"{where}: not the index this corpus was made with; copy it again")
        return index

    def _read_blocks(self, document: int, begin: int, stop: int, crcs: np.ndarray) -> np.ndarray:
        """Tokens ``begin..stop`` of a document, whole blocks, compared with their CRCs."""
        tokens = np.empty(stop - begin, self._dtype)
        data = memoryview(tokens).cast("B")
        offset = int(self._layout.offsets[document]) + begin * self._dtype.itemsize
        self._storage.read_into(self.info.file, offset, data)
        step = CRC_BLOCK * self._dtype.itemsize
        for block, expected in enumerate(crcs.tolist()):
            found = data[block * step : (block + 1) * step]
            if zlib.crc32(found) == expected:
                continue
            begin = offset + block * step
            changed = locate_changed_byte(found, expected)
            if changed is None:
                what = f"bytes {begin} to {begin + len(found) - 1} are not what was written"
            else:
                place, written = changed
                what = f"byte {begin + place} is 0x{found[place]:02x} where 0x{written:02x} was written"
            raise _ChangedError(f"{self.where}: {self._member_name(document)}: {what}; copy the shard again")
        return tokens

    def _member_name(self, document: int) -> str:
        """The name of the document's tokens in the tar, as far as the tar still says it."""
        try:
            return self._members(document)[0]
        except (ShardError, tarfile.TarError, ValueError, OSError):
            return f"document {document} of the shard"

    def _members(self, document: int) -> tuple[str, dict[str, Any]]:
        """(name of the tokens' member, the JSON that stands before it): read from the end of the document before."""
        layout = self._layout
        begin = 0
        if document:
            size = int(layout.lengths[document - 1]) * self._dtype.itemsize
            begin = -(-(int(layout.offsets[document - 1]) + size) // _TAR_BLOCK) * _TAR_BLOCK
        region = bytearray(int(layout.offsets[document]) - begin)
        self._storage.read_into(self.info.file, begin, memoryview(region))
        with tarfile.open(fileobj=io.BytesIO(region), mode="r|") as tar:
            header = tar.next()
            payload = tar.extractfile(header) if header else None
            info = json.load(payload) if payload else {}
            tokens = tar.next()
        return (tokens.name if tokens else f"document {document} of the shard"), info
