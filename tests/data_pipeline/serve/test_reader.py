"""Random access to a corpus on disk, intact and damaged."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bst_base.errors import StorageError, UserError
from data_pipeline.format.damage import locate_changed_byte
from data_pipeline.format.extents import shard_extents, to_bytes
from data_pipeline.format.manifest import ExtentsInfo, Manifest
from data_pipeline.format.shards import ShardError, ShardIndex
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.order import windows
from data_pipeline.serve.order.stream import TokenStream
from data_pipeline.serve.reader import Corpus
from data_pipeline.serve.shard_reader import ShardReader
from data_pipeline.serve.share import Share
from data_pipeline.store.mapped import Collector

LENGTHS = [20_000, 12, 700, 9_000, 5_000, 1]
TAR = "train-000000.tar"


def payload(directory: Path, name: str, member: str) -> int:
    """Return the position in a tar where a member's tokens begin, according to tarfile."""
    with tarfile.open(directory / name) as tar:
        return tar.getmember(member).offset_data + 128  # the header of a .npy of version 1


def flip(path: Path, byte: int) -> int:
    """Flip one bit; return the original byte."""
    data = bytearray(path.read_bytes())
    old = data[byte]
    data[byte] ^= 0x20
    path.write_bytes(data)
    return old


def test_any_token_range_equals_that_of_the_document(make_corpus: Any) -> None:
    corpus = Corpus.open(str(make_corpus(LENGTHS)))
    for number, length in enumerate(LENGTHS):
        whole = (10 + (31 * number + np.arange(length)) % 380).astype("<u2")
        whole[-1] = corpus.manifest.tokenizer.eos_id
        assert np.array_equal(corpus.document(number), whole)
        for start, stop in ((0, 0), (0, 1), (length // 2, length), (length // 3, length // 3 + length // 2)):
            assert np.array_equal(corpus.tokens(number, start, stop), whole[start:stop])
    assert corpus.lengths.tolist() == LENGTHS
    assert len(corpus) == len(LENGTHS)
    assert corpus.tokens_total == sum(LENGTHS)
    with pytest.raises(IndexError):
        corpus.tokens(1, 0, 13)


def test_document_info_is_read_from_the_json_of_the_shard(make_corpus: Any) -> None:
    corpus = Corpus.open(str(make_corpus(LENGTHS, shards=3)))
    assert [corpus.document_info(i)["path"] for i in range(len(LENGTHS))] == [f"d{i}" for i in range(len(LENGTHS))]


@pytest.mark.parametrize("place", [0, 1, 16_383, 16_384, 39_999])
def test_a_flipped_byte_is_named_by_shard_member_and_byte(make_corpus: Any, place: int) -> None:
    directory = make_corpus(LENGTHS)
    byte = payload(directory, TAR, "00000000.tok.npy") + place
    old = flip(directory / TAR, byte)
    with pytest.raises(ShardError) as caught:
        Corpus.open(str(directory)).document(0)
    message = f"{TAR}: 00000000.tok.npy: byte {byte} is 0x{old ^ 0x20:02x} where 0x{old:02x} was written"
    assert message in str(caught.value)


def test_damage_of_many_bytes_is_named_by_its_block(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    begin = payload(directory, TAR, "00000000.tok.npy")
    for byte in range(begin + 20_000, begin + 20_100):
        flip(directory / TAR, byte)
    with pytest.raises(ShardError, match=rf"00000000.tok.npy: bytes {begin + 16_384} to {begin + 32_767} are not"):
        Corpus.open(str(directory)).document(0)


def test_intact_blocks_of_a_damaged_document_can_be_read(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    expected = Corpus.open(str(directory)).document(0)
    flip(directory / TAR, payload(directory, TAR, "00000000.tok.npy") + 20_000)
    corpus = Corpus.open(str(directory))
    assert np.array_equal(corpus.tokens(0, 0, 8192), expected[:8192])
    with pytest.raises(ShardError):
        corpus.tokens(0, 8191, 8193)


@given(data=st.binary(min_size=1, max_size=300), place=st.integers(0, 299), change=st.integers(1, 255))
def test_one_changed_byte_is_located_from_the_crc(data: bytes, place: int, change: int) -> None:
    place %= len(data)
    damaged = bytearray(data)
    damaged[place] ^= change
    assert locate_changed_byte(damaged, zlib.crc32(data)) == (place, data[place])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / TAR).unlink(), f"{TAR}: the shard is missing"),
        (lambda d: os.truncate(d / TAR, 30_000), f"{TAR}: 30000 bytes, expected 51200: cut short or replaced"),
        (lambda d: (d / "tokenizer.model").unlink(), "the tokenizer is missing"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"x"), "not a SentencePiece model"),
        (lambda d: (d / "manifest.json").unlink(), "no prepared corpus there"),
        (lambda d: (d / "manifest.json").write_text("{"), "not a manifest"),
    ],
)
def test_missing_or_foreign_files_are_named_when_a_corpus_is_opened(
    make_corpus: Any, damage: Any, message: str
) -> None:
    directory = make_corpus(LENGTHS)
    damage(directory)
    with pytest.raises(UserError, match=message):
        open_corpora(DataConfig(corpus=str(directory)))


def test_each_shard_costs_one_question_to_the_file_system_when_a_corpus_is_opened(make_corpus, monkeypatch):
    """Every rank of a job opens the corpus at the same moment."""
    directory, asked, stat = make_corpus(LENGTHS), [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: asked.append(path.name) or stat(path, **how))
    (corpus,) = open_corpora(DataConfig(corpus=str(directory)))
    shards = [shard.file for shard in corpus.manifest.shards("train")]
    assert [name for name in asked if name.endswith(".tar")] == shards


@pytest.mark.parametrize(
    "damage",
    [
        lambda idx: shutil.copy(idx.with_name("train-000001.idx"), idx),
        lambda idx: os.truncate(idx, 100),
        lambda idx: flip(idx, 70),
    ],
)
def test_damaged_index_is_rebuilt_only_from_an_intact_tar(make_corpus: Any, damage: Any) -> None:
    directory = make_corpus(LENGTHS)
    expected = Corpus.open(str(directory)).document(0)
    damage(directory / "train-000000.idx")
    assert np.array_equal(Corpus.open(str(directory)).document(0), expected)
    flip(directory / TAR, payload(directory, TAR, "00000000.tok.npy"))
    with pytest.raises(ShardError, match=r"train-000000\.idx: "):
        Corpus.open(str(directory)).document(0)


def test_disk_read_error_is_bad_data_and_not_a_crash(make_corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreadable page would kill a process that has mapped it; a failing read call gives one message."""
    directory = make_corpus(LENGTHS)
    corpus = Corpus.open(str(directory))
    real = os.preadv

    def fail(descriptor: int, buffers: Any, offset: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == TAR:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(Collector, "collect", lambda *_: None)  # as if a page could not be read
    with pytest.raises(ShardError, match=rf"{TAR}: cannot be read at byte \d+: Input/output error") as failed:
        corpus.document(0)
    assert failed.value.exit_status == StorageError.exit_status  # not skipped, it ends the run: a restart may read it
    _, mask, messages = whole_batch(directory, "skip", 1, lambda: None)
    assert mask.any() and not mask.all()
    assert all("Input/output error" in message for message in messages) and messages


def test_shard_without_read_permission_is_an_error_and_never_skipped(
    make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_corpus(LENGTHS)
    real = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == TAR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match=f"cannot open .*{TAR}: Permission denied"):
        whole_batch(directory, "skip", 1, lambda: None)


def test_documents_of_more_than_2_to_32_tokens_keep_their_length(
    make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_corpus(LENGTHS)
    long, real = 2**32 + 5, ShardReader.read_index

    def read_index(self: ShardReader) -> ShardIndex:
        index = real(self)
        return dataclasses.replace(index, lengths=np.where(index.lengths == 700, np.uint64(long), index.lengths))

    monkeypatch.setattr(ShardReader, "read_index", read_index)
    corpus = Corpus.open(str(directory))
    assert corpus.lengths.tolist() == [long if length == 700 else length for length in LENGTHS]
    for block in (None, 64):
        stream = TokenStream(corpus.lengths, block, ("documents", 0))
        assert stream.total == sum(-(-n // (block or 1)) * (block or 1) for n in corpus.lengths.tolist())
        place = np.flatnonzero(stream.pieces(np.array([0]), stream.total).length == long)
        assert len(place) == 1


def test_index_and_shard_of_another_corpus_are_refused(make_corpus: Any) -> None:
    directory, other = make_corpus(LENGTHS), make_corpus(LENGTHS, name="other", start=5)
    shutil.copy(other / TAR, directory / TAR)  # of the same size
    with pytest.raises(ShardError, match="are not what was written"):
        Corpus.open(str(directory)).document(0)
    shutil.copy(other / "train-000000.idx", directory / "train-000000.idx")
    with pytest.raises(ShardError, match="not the index this corpus was made with"):  # this tar's index is also refused
        Corpus.open(str(directory)).document(0)


def test_tar_truncated_while_it_is_read_is_an_error_not_a_crash(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    corpus = Corpus.open(str(directory))
    corpus.tokens(0, 0, 10)
    os.truncate(directory / TAR, 30_000)
    with pytest.raises(ShardError, match=f"{TAR}: cut short: it ends before byte 30000"):
        corpus.document(0)


def test_missing_index_is_built_from_the_tar(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    expected = Corpus.open(str(directory)).document(2)
    (directory / "train-000000.idx").unlink()
    assert np.array_equal(Corpus.open(str(directory)).document(2), expected)
    assert not (directory / "train-000000.idx").exists()  # reading a corpus writes nothing into it
    os.truncate(directory / TAR, 30_000)
    with pytest.raises(ShardError, match="cut short"):
        Corpus.open(str(directory)).document(2)


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_no_index_is_opened_before_its_window_is_read(
    make_corpus: Any, monkeypatch: pytest.MonkeyPatch, documents: str
) -> None:
    directory = make_corpus([40] * 60, shards=20)
    add_extents(directory)
    monkeypatch.setattr(windows, "WINDOW_TOKENS", 6 * 2048)  # two shards
    opened, real = [], ShardReader.read_index
    monkeypatch.setattr(ShardReader, "read_index", lambda self: opened.append(self.info.index) or real(self))
    config = DataConfig(corpus=str(directory), documents=documents, prefetch=0)
    share = Share(length=64, rows=64, micro_rows=8)
    loader = Loader(config, open_corpora(config), share, block=64, seed=1)
    assert not opened
    steps = range(loader.sequences[0] // 64)
    inputs = [np.concatenate([batch.input_ids for batch in loader.batches(step)]) for step in steps]
    assert len(opened) <= 20 and len(set(opened)) == len(opened)
    del opened[:]
    without = json.loads((directory / "manifest.json").read_text())
    del without["extents"]
    (directory / "manifest.json").write_text(json.dumps(without))
    loader = Loader(config, open_corpora(config), share, block=64, seed=1)
    assert len(set(opened)) == len(opened) == (0 if documents == "joined" else 20)  # isolated: needs all indexes
    again = [np.concatenate([batch.input_ids for batch in loader.batches(step)]) for step in steps]
    assert np.array_equal(inputs, again)


def add_extents(directory: Path) -> bytes:
    """Write the extents file of the shards, as a preparation does; return its bytes."""
    manifest = Manifest.read(directory)
    indexes = [ShardIndex.read(directory / shard.index) for shard in manifest.shards("train")]
    data = to_bytes([shard_extents(index.lengths) for index in indexes])
    (directory / "train.extents").write_bytes(data)
    info = ExtentsInfo(file="train.extents", sha256=hashlib.sha256(data).hexdigest())
    manifest.model_copy(update={"extents": {"train": info}}).write(directory)
    return data


def test_extents_equal_the_documents_and_damaged_extents_are_ignored(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS, shards=3)
    data = add_extents(directory)
    for block in (8, 64, 32_768, 24):
        expected = [sum(-(-n // block) * block for n in LENGTHS[at : at + 2]) for at in (0, 2, 4)]
        corpus = Corpus.open(str(directory))
        assert corpus.shard_sizes(block).extents.tolist() == expected
        assert bool(corpus.open_shards) == (block == 24)  # not a power of two, so the indexes were read
    for damage in (b"", data[:-1] + b""):
        (directory / "train.extents").write_bytes(damage)
        corpus = Corpus.open(str(directory))
        assert corpus.shard_sizes(24).extents.tolist() == corpus.shard_sizes(24).extents.tolist() == expected


def test_an_index_that_does_not_fit_the_manifest_is_refused(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens": 20712', '"tokens": 20711'))
    with pytest.raises(ShardError, match=r"take up 34713 tokens, by the manifest 34712"):
        whole_batch(directory, "stop", 1, lambda: None)


def test_another_tokenizer_is_refused(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    with (directory / "tokenizer.model").open("ab") as file:
        file.write(b"\x52\x00")  # an unknown field: still a model, of another hash
    with pytest.raises(UserError, match="not the tokenizer this corpus was made with"):
        Corpus.open(str(directory))


def test_a_split_that_is_empty_or_unknown_is_refused(make_corpus: Any) -> None:
    directory = str(make_corpus(LENGTHS))
    with pytest.raises(UserError, match="the split is empty"):
        Corpus.open(directory, "validation")
    with pytest.raises(UserError, match="no split 'test', only train, validation"):
        Corpus.open(directory, "test")


def test_model_with_too_few_ids_is_refused(make_corpus: Any) -> None:
    corpus = Corpus.open(str(make_corpus(LENGTHS)))
    corpus.require_vocabulary(400)
    with pytest.raises(UserError, match="its tokenizer has 400 ids, the model only 399"):
        corpus.require_vocabulary(399)
    assert corpus.token_bytes().shape == (400,)


def whole_batch(directory: Path, policy: str, sp: int, damaged: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return (inputs, masks, messages) of the steps of a pass, assembled from sp slices."""
    config = DataConfig(corpus=str(directory), on_bad_shard=policy, prefetch=0)
    corpora = [Corpus.open(str(directory))]
    damaged()
    parts, messages = [], []
    for rank in range(sp):
        share = Share(length=512, rows=2, micro_rows=2, sp_rank=rank, sp=sp)
        loader = Loader(config, corpora, share, block=64, seed=1)
        batches = [loader.batches(step)[0] for step in range(34)]
        parts.append([np.stack([b.input_ids, b.loss_mask]) for b in batches])
        messages += loader.bad
    inputs, masks = np.concatenate([np.stack(part) for part in parts], axis=-1).swapaxes(0, 1)
    return inputs, masks.astype(bool), messages


def test_skipping_masks_only_the_damaged_block_and_records_it(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    byte = payload(directory, TAR, "00000000.tok.npy") + 20_000
    good, good_mask, _ = whole_batch(directory, "stop", 1, lambda: None)
    found, mask, messages = whole_batch(directory, "skip", 1, lambda: flip(directory / TAR, byte))
    lost = found != good
    # The steps read every token of the block once or twice. Each damaged token is masked, and so is the one before it.
    assert lost.sum() > 8000
    assert not mask[lost].any()
    assert (good_mask & ~mask).sum() <= lost.sum() + 20
    assert len(messages) == 1 and f"byte {byte}" in messages[0]
    again = whole_batch(directory, "skip", 4, lambda: None)
    assert np.array_equal(again[0], found) and np.array_equal(again[1], mask)


def test_skipping_a_missing_shard_serves_the_others(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    _, mask, messages = whole_batch(directory, "skip", 1, (directory / TAR).unlink)
    assert mask.any() and not mask.all()
    assert messages == [f"{directory / TAR}: the shard is missing; copy it again, or prepare the corpus again"]


def test_error_in_the_prefetch_thread_is_raised_in_the_loop(make_corpus: Any) -> None:
    directory = make_corpus(LENGTHS)
    config = DataConfig(corpus=str(directory))
    loader = Loader(config, open_corpora(config), Share(length=512, rows=2, micro_rows=2), block=64, seed=1)
    flip(directory / TAR, payload(directory, TAR, "00000000.tok.npy") + 20_000)
    with pytest.raises(ShardError, match=r"00000000\.tok\.npy"):
        for step, _ in loader:
            assert step < 40
    loader.close()
