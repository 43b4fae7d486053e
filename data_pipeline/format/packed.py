"""Packed files: the tokens of a shard without the tar around them, for fast reads of rows of short documents.

A tar needs about 1,900 bytes per document in addition to its tokens. If that is more than a quarter of the tokens, a
packed file next to the tar holds the tokens of all its documents, back to back. A CRC-32 of every `CRC_BLOCK` tokens
follows, then the hash of the tar. The file can be made from the tar, so the manifest does not list it: a corpus is the
same with or without it. If it is missing or damaged, the tar is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bst_base.files import atomic_file
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import CRC_BLOCK, ShardError, ShardIndex

_WORTH_IT = 1.25  # minimum bytes of the tar per byte of tokens for which a packed file is made
_MAGIC = b"BSTTOKEN"
_FOOTER = np.dtype([("magic", "S8"), ("version", "<u4"), ("crc_block", "<u4"), ("tar_sha256", "V32"), ("crc", "<u4")])
_VERSION = 1


def packed_name(tar: str) -> str:
    """Return the name of the packed file of a tar."""
    return f"{tar.removesuffix('.tar')}.tokens"


def is_worth_it(index: ShardIndex) -> bool:
    """Whether a shard's documents are so short that a packed file is made for it."""
    return index.tar_bytes > _WORTH_IT * int(index.lengths.sum()) * index.dtype.itemsize


def write_packed(tar: Path, index: ShardIndex) -> bool:
    """Write the packed file of a shard if that is worth it, else remove an existing one.

    Returns whether the file exists now.
    """
    path = tar.with_name(packed_name(tar.name))
    if not is_worth_it(index):
        path.unlink(missing_ok=True)
        return False
    with tar.open("rb") as source, atomic_file(path) as file:
        file.writelines(_content(source, index))
    return True


def packed_damage(tar: Path, index: ShardIndex) -> str | None:
    """Compare a packed file with its intact tar; return what is wrong, or None.

    It may be missing although it should exist, or differ from the tar at a byte.
    """
    path, place = tar.with_name(packed_name(tar.name)), 0
    if not path.exists():
        return "missing" if is_worth_it(index) else None
    with tar.open("rb") as source, path.open("rb") as file:
        for expected in _content(source, index):
            found = file.read(len(expected))
            if found != expected:
                return _first_difference(found, expected, place)
            place += len(expected)
        return f"goes on after byte {place}, where it should end" if file.read(1) else None


def _first_difference(found: bytes, expected: bytes, begin: int) -> str:
    for place, (byte, right) in enumerate(zip(found, expected, strict=False)):
        if byte != right:
            return f"byte {begin + place} is 0x{byte:02x}, but 0x{right:02x} in the tar"
    return f"cut short at byte {begin + len(found)}"


def tail_bytes(info: ShardInfo) -> int:
    """Return the number of bytes after the tokens in a shard's packed file."""
    return -(-info.tokens // CRC_BLOCK) * 4 + _FOOTER.itemsize


def parse_tail(data: bytes | memoryview, where: str, info: ShardInfo) -> np.ndarray:
    """Return (blocks,) uint32: the CRCs, from the bytes after the tokens.

    Raises ShardError when these are damaged or belong to another shard. `where`: the file, for messages.
    """
    footer = np.frombuffer(data, _FOOTER, count=1, offset=len(data) - _FOOTER.itemsize)[0]
    if footer["magic"] != _MAGIC or zlib.crc32(data[:-4]) != footer["crc"]:
        raise ShardError(f"{where}: the checksums after the tokens are damaged; delete the file, run 'bst data pack'")
    if (footer["version"], footer["crc_block"]) != (_VERSION, CRC_BLOCK):
        raise ShardError(f"{where}: version {footer['version']}, this program reads {_VERSION}")
    if footer["tar_sha256"].tobytes().hex() != info.sha256:
        raise ShardError(f"{where}: the tokens of another shard than {info.file}")
    return np.frombuffer(data, "<u4", count=-(-info.tokens // CRC_BLOCK)).astype(np.uint32)


def _content(tar: BinaryIO, index: ShardIndex) -> Iterator[bytes]:
    """Yield the file's bytes: one block of tokens at a time, then the tail."""
    crcs = []
    for block in _blocks(tar, index):
        crcs.append(zlib.crc32(block))
        yield block
    footer = np.zeros((), _FOOTER)
    footer["magic"], footer["version"], footer["crc_block"] = _MAGIC, _VERSION, CRC_BLOCK
    footer["tar_sha256"] = bytes.fromhex(index.tar_sha256)
    tail = np.array(crcs, "<u4").tobytes() + footer.tobytes()[:-4]
    yield tail + zlib.crc32(tail).to_bytes(4, "little")


def _blocks(tar: BinaryIO, index: ShardIndex) -> Iterator[bytes]:
    """Yield the tokens of all documents, back to back, in blocks of `CRC_BLOCK`. The last block may be shorter."""
    size, pending = CRC_BLOCK * index.dtype.itemsize, bytearray()
    lengths = index.lengths.astype(np.int64) * index.dtype.itemsize
    for offset, length in zip(index.offsets.tolist(), lengths.tolist(), strict=True):
        tar.seek(offset)
        pending += tar.read(length)
        whole = len(pending) // size * size
        yield from (bytes(pending[begin : begin + size]) for begin in range(0, whole, size))
        del pending[:whole]
    if pending:
        yield bytes(pending)
