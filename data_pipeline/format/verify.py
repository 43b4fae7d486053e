"""Checks a prepared corpus against its manifest: every hash, every CRC, every document."""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from webdataset import tariterators

from bst_base.errors import UserError
from data_pipeline.format.damage import locate_changed_byte
from data_pipeline.format.extents import shard_extents, to_bytes
from data_pipeline.format.manifest import Manifest, sha256_file
from data_pipeline.format.packed import packed_damage, packed_name
from data_pipeline.format.shard_table import ShardInfo
from data_pipeline.format.shards import CRC_BLOCK, ShardError, ShardIndex, token_crcs
from data_pipeline.format.tokenizer import read_tokenizer


class Problem(NamedTuple):
    """A difference from the manifest."""

    file: str
    what: str


class VerifyTask(NamedTuple):
    """The data that a worker needs to verify one shard."""

    corpus: Path
    shard: ShardInfo
    vocab_size: int
    dtype: str


def _unreadable(error: OSError, path: Path) -> Problem:
    return Problem(Path(error.filename or path).name, f"cannot be read: {error.strerror or error}")


def verify_tokenizer(corpus: Path, manifest: Manifest) -> list[Problem]:
    """Return the problems of the tokenizer: missing, a different one, or other special ids than the manifest's."""
    info = manifest.tokenizer
    try:
        tokenizer = read_tokenizer(corpus / info.file)
    except UserError as error:
        return [Problem(info.file, str(error))]
    except OSError as error:
        return [_unreadable(error, corpus / info.file)]
    if tokenizer.sha256 != info.sha256:
        return [Problem(info.file, f"wrong tokenizer: SHA-256 {tokenizer.sha256[:12]}…, expected {info.sha256[:12]}…")]
    return [
        Problem(info.file, f"{name} is {getattr(tokenizer, name)}, the manifest says {getattr(info, name)}")
        for name in ("vocab_size", "bos_id", "eos_id", "pad_id")
        if getattr(tokenizer, name) != getattr(info, name)
    ]


def verify_extents(corpus: Path, manifest: Manifest) -> list[Problem]:
    """Return problems of the extents files. They are compared with the indexes."""
    problems = []
    for split, info in (manifest.extents or {}).items():
        path = corpus / info.file
        try:
            if not path.exists():
                problems.append(Problem(info.file, "missing: isolated documents are served after reading every index"))
            elif sha256_file(path) != info.sha256:
                problems.append(Problem(info.file, "SHA-256 differs from the manifest's"))
            elif path.read_bytes() != _extents_of(corpus, manifest, split):
                problems.append(Problem(info.file, "not what the indexes say"))
        except OSError as error:
            problems.append(_unreadable(error, path))
    return problems


def _extents_of(corpus: Path, manifest: Manifest, split: str) -> bytes:
    """Return the correct content of the file.

    If an index is unreadable, return the file itself: the shard is the problem.
    """
    with contextlib.suppress(ShardError):
        indexes = (ShardIndex.read(corpus / shard.index) for shard in manifest.shards(split))
        return to_bytes([shard_extents(index.lengths) for index in indexes])
    return (corpus / manifest.extents[split].file).read_bytes()


def verify_shard(task: VerifyTask) -> list[Problem]:
    """Return the problems of one shard; empty if tar, index, manifest, stock webdataset and packed file all agree."""
    tar, index_path = task.corpus / task.shard.file, task.corpus / task.shard.index
    try:
        index = ShardIndex.read(index_path)
        if index.tar_sha256 != task.shard.sha256:
            what = f"the index of another shard: of {index.tar_sha256[:12]}…, expected {task.shard.sha256[:12]}…"
            return [Problem(index_path.name, what)]
        if sha256_file(index_path) != task.shard.index_sha256:
            return [Problem(index_path.name, "not the index that the manifest names: its SHA-256 differs")]
        if not tar.exists():
            return [Problem(tar.name, "the shard is missing")]
        if tar.stat().st_size != task.shard.bytes:
            return [
                Problem(tar.name, f"{_first_bad(tar, index)}; {tar.stat().st_size} bytes, expected {task.shard.bytes}")
            ]
        if sha256_file(tar) != task.shard.sha256:
            return [Problem(tar.name, f"{_first_bad(tar, index)}; so its SHA-256 differs from the manifest's")]
        problems = [Problem(tar.name, what) for what in _compare_with_webdataset(tar, index, task)]
        packed = packed_damage(tar, index) if tar.with_name(packed_name(tar.name)).exists() else None
        return [*problems, *([Problem(packed_name(tar.name), packed)] if packed else [])]
    except ShardError as error:
        return [Problem(tar.name, str(error))]
    except OSError as error:
        return [_unreadable(error, tar)]


def _first_bad(tar: Path, index: ShardIndex) -> str:
    """Return the first place where a damaged tar differs: member, token block and bytes, if the index can tell."""
    size = index.dtype.itemsize
    with tar.open("rb") as file:
        for i, (offset, length, start) in enumerate(zip(index.offsets, index.lengths, index.crc_starts, strict=True)):
            file.seek(int(offset))
            data = file.read(int(length) * size)
            if len(data) < int(length) * size:
                return f"cut short in {_member_at(tar, int(offset), i)}, at byte {tar.stat().st_size}"
            crcs = token_crcs(np.frombuffer(data, index.dtype))
            bad = np.flatnonzero(crcs != index.crc[start : start + len(crcs)])
            if len(bad):
                begin = int(bad[0]) * CRC_BLOCK * size
                block = data[begin : begin + CRC_BLOCK * size]
                where = f"bytes {int(offset) + begin} to {int(offset) + begin + len(block) - 1}"
                changed = locate_changed_byte(block, int(index.crc[start + int(bad[0])]))
                if changed is not None:
                    place, was = changed
                    where = f"byte {int(offset) + begin + place} is 0x{block[place]:02x}, was 0x{was:02x}"
                return f"{_member_at(tar, int(offset), i)}: token block {bad[0]} is damaged ({where})"
    return "the damage is outside the tokens, in a member's header or JSON"


def _member_at(tar: Path, byte: int, document: int) -> str:
    """Return the name of the member that holds a byte, if the tar can still be read that far."""
    try:
        with tarfile.open(tar, mode="r:") as members:
            for member in members:
                if member.offset_data <= byte < member.offset_data + member.size:
                    return member.name
    except (tarfile.TarError, EOFError):
        pass
    return f"document {document}"


def _compare_with_webdataset(tar: Path, index: ShardIndex, task: VerifyTask) -> Iterator[str]:
    count = tokens = 0
    for i, sample in enumerate(_samples(tar)):
        array, info = sample["tok.npy"], sample["json"]
        count, tokens = count + 1, tokens + len(array)
        if i >= len(index.lengths) or len(array) != index.lengths[i] or info["id"] != index.ids[i]:
            yield f"{sample['__key__']}: the tar and the index disagree on document {i}"
            return
        start = index.crc_starts[i]
        crcs = token_crcs(array)
        if not np.array_equal(crcs, index.crc[start : start + len(crcs)]):
            yield f"{sample['__key__']}: its tokens do not have the index's CRCs"
        if len(array) and int(array.max()) >= task.vocab_size:
            yield f"{sample['__key__']}: token {int(array.max())} is outside the vocabulary of {task.vocab_size}"
        if array.dtype != np.dtype(task.dtype) or info["n_tokens"] != len(array):
            yield f"{sample['__key__']}: {len(array)} tokens of {array.dtype}, its JSON says {json.dumps(info)}"
    if count != task.shard.documents or tokens != task.shard.tokens:
        yield f"{count} documents, {tokens} tokens; expected {task.shard.documents}, {task.shard.tokens}"


def _samples(tar: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar as unmodified webdataset reads them.

    It gets the open file: it would take a path with ``{a,b}``, ``::`` or a colon for one or several addresses.
    """
    with tar.open("rb") as stream:
        members = tariterators.tar_file_expander([{"url": str(tar), "stream": stream}])
        yield from map(webdataset.Decoder([]), tariterators.group_by_keys(members))
