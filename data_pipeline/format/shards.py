"""Shards: byte-reproducible WebDataset tars of tokenized documents, and the index that allows random access.

For each document, a tar holds ``<key>.json`` (its metadata), then ``<key>.tok.npy`` (its tokens). The index holds the
offset of each document's tokens, and a CRC-32 of every `CRC_BLOCK` tokens. So a reader gets any run of tokens with one
ranged read, and can check that the bytes are those that were written.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from bst_base.errors import UserError
from bst_base.files import atomic_file
from data_pipeline.format.tar_header import CheckedHeader

CRC_BLOCK = 8192
"""Tokens that share one CRC. Blocks start anew at each document."""

_MAGIC = b"BSTINDEX"
_VERSION = 1
_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("itemsize", "<u4"),
        ("crc_block", "<u4"),
        ("reserved", "<u4"),
        ("documents", "<u8"),
        ("crcs", "<u8"),
        ("tar_bytes", "<u8"),
        ("tar_sha256", "V32"),
    ]
)
_ENTRY = np.dtype([("offset", "<u8"), ("tokens", "<u8"), ("id", "<u8")])


class ShardError(UserError):
    """A shard or an index is damaged or the wrong one. The message names the file, the member and the byte."""


class ShardWriter:
    """Writes documents into a tar whose bytes depend only on the documents (no times, no owners)."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, key: str, info: dict[str, Any], tokens: np.ndarray) -> None:
        """Append one document.

        `key` must not contain a dot (WebDataset splits names at the first one); `tokens` is (n,).
        """
        header = json.dumps(info, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
        payload = io.BytesIO()
        np.lib.format.write_array(payload, np.ascontiguousarray(tokens), version=(1, 0))
        self._member(f"{key}.json", header)
        self._member(f"{key}.tok.npy", payload.getvalue())

    def close(self) -> None:
        """Write the end-of-archive blocks; the underlying file stays open."""
        self._tar.close()

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


@dataclass(frozen=True)
class ShardIndex:
    """The places of a shard's documents: document i has `lengths[i]` tokens, from byte `offsets[i]` of the tar on."""

    offsets: np.ndarray  # (documents,) uint64: byte offset in the tar of the document's first token
    lengths: np.ndarray  # (documents,) uint64: tokens
    ids: np.ndarray  # (documents,) uint64: the `id` of the document's JSON
    crc: np.ndarray  # (blocks,) uint32: CRCs of all documents' blocks, one document after the other
    dtype: np.dtype  # type of the tokens
    tar_bytes: int
    tar_sha256: str

    @property
    def crc_starts(self) -> np.ndarray:
        """(documents,) int64: the place in `crc` of each document's first block."""
        blocks = _blocks(self.lengths)
        return np.cumsum(blocks) - blocks

    def to_bytes(self) -> bytes:
        """Return the file's bytes: header, one entry per document, the CRCs, and a CRC-32 of all these bytes."""
        header = np.zeros((), _HEADER)
        header["magic"], header["version"], header["itemsize"] = _MAGIC, _VERSION, self.dtype.itemsize
        header["crc_block"], header["documents"], header["crcs"] = CRC_BLOCK, len(self.offsets), len(self.crc)
        header["tar_bytes"], header["tar_sha256"] = self.tar_bytes, bytes.fromhex(self.tar_sha256)
        entries = np.empty(len(self.offsets), _ENTRY)
        entries["offset"], entries["tokens"], entries["id"] = self.offsets, self.lengths, self.ids
        body = header.tobytes() + entries.tobytes() + self.crc.astype("<u4").tobytes()
        return body + zlib.crc32(body).to_bytes(4, "little")

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ShardIndex:
        """Parse an index read from `where`; raises ShardError when it is damaged or of another version."""
        if len(data) < _HEADER.itemsize + 4 or data[:8] != _MAGIC:
            raise ShardError(f"{where}: not a shard index (too short, or its first 8 bytes are not {_MAGIC.decode()})")
        header = np.frombuffer(data, _HEADER, count=1)[0]
        if header["version"] != _VERSION or header["crc_block"] != CRC_BLOCK:
            raise ShardError(f"{where}: index version {header['version']}, this program reads {_VERSION}")
        documents, crcs = int(header["documents"]), int(header["crcs"])
        expected = _HEADER.itemsize + documents * _ENTRY.itemsize + crcs * 4 + 4
        if len(data) != expected:
            raise ShardError(f"{where}: {len(data)} bytes, expected {expected}: the index is cut short; copy it again")
        if zlib.crc32(memoryview(data)[:-4]) != int.from_bytes(data[-4:], "little"):
            raise ShardError(f"{where}: its own checksum does not match: the index is damaged; copy it again")
        entries = np.frombuffer(data, _ENTRY, count=documents, offset=_HEADER.itemsize)
        crc = np.frombuffer(data, "<u4", count=crcs, offset=_HEADER.itemsize + entries.nbytes)
        return cls(
            offsets=np.ascontiguousarray(entries["offset"]),
            lengths=np.ascontiguousarray(entries["tokens"]),
            ids=np.ascontiguousarray(entries["id"]),
            crc=crc,
            dtype=np.dtype(f"<u{header['itemsize']}"),
            tar_bytes=int(header["tar_bytes"]),
            tar_sha256=header["tar_sha256"].tobytes().hex(),
        )

    @classmethod
    def read(cls, path: str | Path) -> ShardIndex:
        """Read an index file; raises ShardError when it is missing or damaged."""
        try:
            return cls.from_bytes(Path(path).read_bytes(), str(path))
        except FileNotFoundError:
            raise ShardError(f"{path}: the index is missing") from None

    def write(self, path: Path) -> None:
        """Write the index file atomically."""
        with atomic_file(path) as file:
            file.write(self.to_bytes())

    @classmethod
    def build(cls, tar_path: str | Path) -> ShardIndex:
        """Make the index of a tar in one sequential pass; raises ShardError, naming the problem, for a damaged tar."""
        offsets, lengths, ids, crcs, dtype = [], [], [], [], None
        with _HashingFile(Path(tar_path)) as file:
            for member, info, tokens in read_shard(file, str(tar_path)):
                dtype = dtype or tokens.dtype
                if tokens.dtype != dtype:
                    raise ShardError(f"{tar_path}: {member.name}: tokens are {tokens.dtype}, the others {dtype}")
                offsets.append(member.offset_data + member.size - tokens.nbytes)
                lengths.append(len(tokens))
                ids.append(info["id"])
                crcs.append(token_crcs(tokens))
            digest, size = file.finish()
        return cls(
            offsets=np.array(offsets, np.uint64),
            lengths=np.array(lengths, np.uint64),
            ids=np.array(ids, np.uint64),
            crc=np.concatenate([*crcs, np.empty(0, np.uint32)]),
            dtype=np.dtype("<u2") if dtype is None else dtype,
            tar_bytes=size,
            tar_sha256=digest,
        )


def token_crcs(tokens: np.ndarray) -> np.ndarray:
    """Return (ceil(n / CRC_BLOCK),) uint32: the CRC-32 of each run of CRC_BLOCK tokens of one document."""
    data = memoryview(np.ascontiguousarray(tokens)).cast("B")
    step = CRC_BLOCK * tokens.dtype.itemsize
    return np.array([zlib.crc32(data[start : start + step]) for start in range(0, len(data), step)], np.uint32)


def read_shard(file: BinaryIO, where: str) -> Iterator[tuple[tarfile.TarInfo, dict[str, Any], np.ndarray]]:
    """Yield a shard's documents in order, as (the tar member of the tokens, the document's JSON, tokens (n,)).

    Raises ShardError for a truncated tar, an unexpected member, or tokens that are not an array.
    """
    name = "the first member"
    try:
        with tarfile.open(fileobj=file, mode="r|", tarinfo=CheckedHeader) as tar:
            key, info = "", {}
            for member in tar:
                name = member.name
                stem, _, suffix = name.partition(".")
                payload = tar.extractfile(member) if member.isfile() else None
                if payload is None or suffix not in ("json", "tok.npy"):
                    raise ShardError(f"{where}: {name}: not a member of a shard (byte {member.offset})")
                if suffix == "json":
                    key, info = stem, json.load(payload)
                    if not isinstance(info, dict) or not isinstance(info.get("id"), int):
                        raise ShardError(f"{where}: {name}: no integer 'id' in it (byte {member.offset})")
                    continue
                if stem != key:
                    raise ShardError(
                        f"{where}: {name}: its {stem}.json does not stand before it (byte {member.offset})"
                    )
                yield member, info, _read_tokens(payload, member, where)
                key = ""
            if key:
                raise ShardError(f"{where}: cut short after {name}: its tokens are missing")
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{where}: the tar is damaged or cut short near {name}: {error}") from None
    except (ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise ShardError(f"{where}: {name}: not readable: {error}") from None


def find_document(tar_path: Path, key: str | None, path: str) -> tuple[str, dict[str, Any], np.ndarray] | None:
    """Return (key, JSON, tokens) of the document with this key or, if the key is None, this path.

    Returns None when there is no such document. It reads the headers of the tar, but not the tokens of other documents.
    """
    with _opened(tar_path) as tar:
        for member in tar:
            stem, _, suffix = member.name.partition(".")
            if suffix != "json" or (key is not None and stem != key):
                continue
            info = json.load(cast(IO[bytes], tar.extractfile(member)))
            if key is not None or info["path"] == path:
                tokens = tar.next()
                if tokens is None:
                    raise ShardError(f"{tar_path}: cut short after {member.name}: its tokens are missing")
                return stem, info, _read_tokens(cast(IO[bytes], tar.extractfile(tokens)), tokens, str(tar_path))
    return None


def list_documents(tar_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, JSON) of every document of a shard, in order. The tokens are not read."""
    with _opened(tar_path) as tar:
        for member in tar:
            stem, _, suffix = member.name.partition(".")
            if suffix == "json":
                yield stem, json.load(cast(IO[bytes], tar.extractfile(member)))


@contextmanager
def _opened(tar_path: Path) -> Iterator[tarfile.TarFile]:
    """Open a shard to go through its members; raises ShardError if it is missing, damaged or cut short."""
    try:
        with tarfile.open(tar_path, mode="r:", tarinfo=CheckedHeader) as tar:
            yield tar
    except FileNotFoundError:
        raise ShardError(f"{tar_path}: the shard is missing") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise ShardError(f"{tar_path}: the tar is damaged or cut short: {error}") from None


def _read_tokens(payload: IO[bytes], member: tarfile.TarInfo, where: str) -> np.ndarray:
    data = payload.read()
    if len(data) != member.size:
        raise ShardError(f"{where}: cut short inside {member.name} (byte {member.offset_data + len(data)})")
    stream = io.BytesIO(data)
    tokens = np.lib.format.read_array(stream, allow_pickle=False)
    if tokens.ndim != 1 or tokens.dtype not in (np.dtype("<u2"), np.dtype("<u4")) or stream.tell() != len(data):
        raise ShardError(f"{where}: {member.name}: not a vector of tokens (byte {member.offset_data})")
    return tokens


def _blocks(lengths: np.ndarray) -> np.ndarray:
    return -(-lengths.astype(np.int64) // CRC_BLOCK)


class _HashingFile:
    """A tar opened for one sequential pass, which also computes its SHA-256 and checks that it is not cut short."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("rb")
        except FileNotFoundError:
            raise ShardError(f"{path}: the shard is missing") from None
        self._path = path
        self._digest = hashlib.sha256()
        self._size = 0
        self._tail = b""

    def __enter__(self) -> _HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self._size += len(data)
        self._tail = (self._tail + data[-1024:])[-1024:]
        return data

    def finish(self) -> tuple[str, int]:
        """Return (SHA-256, bytes) of the whole file; raises ShardError when the end-of-archive blocks are missing.

        tarfile accepts the end of a file as the end of an archive, so it does not notice a tar cut between two members.
        """
        while self.read(1 << 20):
            pass
        if self._tail != bytes(1024):
            raise ShardError(f"{self._path}: the tar is cut short: no end of archive before byte {self._size}")
        return self._digest.hexdigest(), self._size
