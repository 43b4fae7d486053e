"""Shards are reproducible tars that standard tools read; their index has the position and checksums of tokens."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import os
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.format.shards import (
    CRC_BLOCK,
    ShardError,
    ShardIndex,
    ShardWriter,
    find_document,
    list_documents,
    token_crcs,
)

LENGTHS = (1, 5, CRC_BLOCK - 1, CRC_BLOCK, CRC_BLOCK + 1, 3 * CRC_BLOCK, 0)


def documents(dtype: str = "<u2") -> list[np.ndarray]:
    return [(np.arange(n) * 7 + i).astype(dtype) for i, n in enumerate(LENGTHS)]


def write(path: Path, arrays: list[np.ndarray]) -> Path:
    with path.open("wb") as file:
        writer = ShardWriter(file)
        for i, tokens in enumerate(arrays):
            writer.add(f"{i:09d}", {"id": 2**63 + i, "n_tokens": len(tokens), "path": f"ü/{i}"}, tokens)
        writer.close()
    return path


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write(tmp_path / "train-000000.tar", documents())


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_the_index_points_at_each_documents_tokens(tmp_path: Path, dtype: str) -> None:
    arrays = documents(dtype)
    tar = write(tmp_path / "a.tar", arrays)
    index, data = ShardIndex.build(tar), tar.read_bytes()
    assert index.dtype == np.dtype(dtype)
    assert index.lengths.tolist() == list(LENGTHS)
    assert index.ids.tolist() == [2**63 + i for i in range(len(LENGTHS))]
    for i, tokens in enumerate(arrays):
        start = int(index.offsets[i])
        assert data[start : start + tokens.nbytes] == tokens.tobytes()
        blocks = [tokens[k : k + CRC_BLOCK].tobytes() for k in range(0, len(tokens), CRC_BLOCK)]
        first = index.crc_starts[i]
        assert index.crc[first : first + len(blocks)].tolist() == [zlib.crc32(block) for block in blocks]
    assert (index.tar_sha256, index.tar_bytes) == (hashlib.sha256(data).hexdigest(), len(data))


def test_webdataset_library_reads_the_documents_in_order(tar: Path) -> None:
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
    assert [sample["json"]["path"] for sample in samples] == [f"ü/{i}" for i in range(len(LENGTHS))]
    for sample, tokens in zip(samples, documents(), strict=True):
        np.testing.assert_array_equal(sample["tok.npy"], tokens)


def test_shard_bytes_depend_only_on_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a.tar", documents()).read_bytes()
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    assert write(tmp_path / "b.tar", documents()).read_bytes() == first
    with tarfile.open(tmp_path / "a.tar") as found:
        assert {(m.mtime, m.uid, m.uname) for m in found} == {(0, 0, "")}


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 3 * CRC_BLOCK), max_size=5), wide=st.booleans())
def test_an_index_file_reads_back_equal(lengths: list[int], wide: bool) -> None:
    dtype = np.dtype("<u4" if wide else "<u2")
    crc = [token_crcs(np.zeros(n, dtype)) for n in lengths]
    index = ShardIndex(
        offsets=np.arange(len(lengths), dtype=np.uint64),
        lengths=np.array(lengths, np.uint64),
        ids=np.full(len(lengths), 2**64 - 1, np.uint64),
        crc=np.concatenate([*crc, np.empty(0, np.uint32)]),
        dtype=dtype,
        tar_bytes=2**40,
        tar_sha256="ab" * 32,
    )
    again = ShardIndex.from_bytes(index.to_bytes(), "x")
    assert again.to_bytes() == index.to_bytes()
    assert (again.dtype, again.tar_bytes, again.tar_sha256) == (dtype, 2**40, "ab" * 32)


def test_every_changed_or_missing_byte_of_an_index_is_detected(tar: Path) -> None:
    data = bytearray(ShardIndex.build(tar).to_bytes())
    for i in range(len(data)):
        data[i] ^= 0x40
        with pytest.raises(ShardError, match=r"^x\.idx: "):
            ShardIndex.from_bytes(bytes(data), "x.idx")
        data[i] ^= 0x40
    for size in (0, 7, 50, len(data) - 1):
        with pytest.raises(ShardError, match=r"cut short|too short"):
            ShardIndex.from_bytes(bytes(data[:size]), "x.idx")


def test_truncated_tar_is_detected(tar: Path, tmp_path: Path) -> None:
    """Also if it is cut between two members, where tarfile sees a complete archive."""
    data = tar.read_bytes()
    end = len(data.rstrip(b"\0"))
    for size in {*range(0, end, 4096), *(512 * k for k in range(8)), end - 1}:
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(ShardError, match=r"cut\.tar"):
            ShardIndex.build(tmp_path / "cut.tar")


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def tokens_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


INFO = json.dumps({"id": 1}).encode()
TOKENS = tokens_file(np.arange(3, dtype="<u2"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([member("a.json", kind=tarfile.SYMTYPE, link="/etc/passwd")], r"a\.json: not a member of a shard"),
        ([member("../a.json", INFO), member("../a.tok.npy", TOKENS)], "not a member of a shard"),
        ([member("a.txt", b"x")], r"a\.txt: not a member of a shard"),
        ([member("a.tok.npy", TOKENS)], r"a\.json does not stand before it"),
        ([member("a.json", INFO), member("b.tok.npy", TOKENS)], r"b\.json does not stand before it"),
        ([member("a.json", INFO)], "its tokens are missing"),
        ([member("a.json", b"{"), member("a.tok.npy", TOKENS)], r"a\.json: not readable"),
        ([member("a.json", b"{}"), member("a.tok.npy", TOKENS)], "'id'"),
        ([member("a.json", INFO), member("a.tok.npy", tokens_file(np.zeros(3)))], "not a vector of tokens"),
        ([member("a.json", INFO), member("a.tok.npy", TOKENS + b"x")], "not a vector of tokens"),
        ([member("a.json", INFO), member("a.tok.npy", b"garbage")], r"a\.tok\.npy: not readable"),
        (
            [member("a.json", INFO), member("a.tok.npy", tokens_file(np.array([{}], dtype=object)))],
            r"a\.tok\.npy: not readable",
        ),
    ],
)
def test_invalid_shard_members_are_refused_by_name(tmp_path: Path, members: list, message: str) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ShardError, match=rf"bad\.tar.*{message}"):
        ShardIndex.build(tmp_path / "bad.tar")


def test_an_empty_shard_has_an_empty_index(tmp_path: Path) -> None:
    index = ShardIndex.build(write(tmp_path / "a.tar", []))
    assert len(index.offsets) == len(index.crc) == 0


def test_find_document_accepts_a_key_or_a_path(tar: Path) -> None:
    key, info, tokens = find_document(tar, "000000003", "")
    assert (key, info["path"], len(tokens)) == ("000000003", "ü/3", LENGTHS[3])
    assert find_document(tar, None, "ü/5")[0] == "000000005"
    assert find_document(tar, "000000099", "") is None


def test_a_damaged_header_is_no_end_of_the_documents(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    place = data.index(b"000000004.json")
    data[place] ^= 1
    tar.write_bytes(data)
    for read in (
        lambda: list(list_documents(tar)),
        lambda: find_document(tar, None, "ü/5"),
        lambda: ShardIndex.build(tar),
    ):
        with pytest.raises(ShardError, match=rf"train-000000\.tar.*the header at byte {place}: bad checksum"):
            read()


def test_a_shard_cut_between_two_documents_is_no_end_of_them(tar: Path) -> None:
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(b"000000004.json")])
    with pytest.raises(ShardError, match="neither a member nor the end"):
        list(list_documents(tar))


class Full(io.BytesIO):
    """A file on a full disk."""

    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_shard_writer_stopped_by_a_full_disk_prints_nothing_on_deletion(monkeypatch) -> None:
    noise = []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    file = Full()
    writer = ShardWriter(file)
    with pytest.raises(OSError, match="No space left"):
        writer.add("0", {"id": 1}, np.zeros(100_000, "<u2"))
    file.close()
    del writer
    gc.collect()
    assert not noise
