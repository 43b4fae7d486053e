"""Rows read from packed files equal the same rows read from the tars."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.format import packed
from data_pipeline.format.packed import packed_damage, packed_name, write_packed
from data_pipeline.format.shards import ShardError, ShardIndex
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.rows import RowReader
from data_pipeline.serve.share import Share
from tests.data_pipeline.serve.test_runs import drawn, same, served

TAR, PACKED = "train-000000.tar", "train-000000.tokens"
SHORT = [300, 20_000, 900, 150, 40, 5000] * 3


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_WORTH_IT", 0)


def pack(directory: Path, *numbers: int) -> None:
    """Write the packed files of a corpus, for all its shards or only the given ones."""
    for number, tar in enumerate(sorted(directory.glob("*.tar"))):
        if not numbers or number in numbers:
            assert write_packed(tar, ShardIndex.read(tar.with_suffix(".idx")))


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def only_packed(directory: Path) -> None:
    """Remove the tokens from the tars, so that rows read from there are noticed."""
    for tar in directory.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))


def strict(config: DataConfig) -> DataConfig:
    """Return the same settings for a run that stops at damaged data."""
    return config.model_copy(update={"on_bad_shard": "stop"})


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_packed_file_has_the_tokens_and_a_crc_per_8192_tokens(make_corpus: Any, dtype: str) -> None:
    directory = make_corpus(drawn(1), dtype=dtype, shards=1)
    pack(directory)
    tokens = []
    with tarfile.open(directory / TAR) as tar:
        for member in tar:
            if member.name.endswith(".npy"):
                tokens.append(np.load(io.BytesIO(tar.extractfile(member).read())))  # type: ignore[union-attr]
    data, found = np.concatenate(tokens).tobytes(), (directory / PACKED).read_bytes()
    step = 8192 * np.dtype(dtype).itemsize
    crcs = [zlib.crc32(data[begin : begin + step]) for begin in range(0, len(data), step)]
    assert found[: len(data)] == data
    assert np.frombuffer(found, "<u4", len(crcs), len(data)).tolist() == crcs


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("settings", [{}, {"documents": "isolated"}, {"mode": "streaming"}, {"packing": "best_fit"}])
def test_batches_from_packed_files_equal_those_from_tars(
    make_corpus: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, settings: dict[str, str]
) -> None:
    one, other = (make_corpus(drawn(seed), name=f"c{seed}", shards=3, dtype=dtype) for seed in range(2))
    mixed = [{"corpus": str(one), "weight": 0.7}, {"corpus": str(other), "weight": 0.3}]
    cases = [(str(one), 0, {}), (str(one), 5, {"slice_tokens": 512, "dp": 4}), (mixed, 11, {"sp": 2, "sp_rank": 1})]
    configs = [DataConfig(corpus=corpus, prefetch=0, **settings) for corpus, *_ in cases]
    expected = [served(config, since, **sizes) for config, (_, since, sizes) in zip(configs, cases, strict=True)]
    pack(one)
    pack(other)
    only_packed(one)
    only_packed(other)
    monkeypatch.setattr(RowReader, "_read_by_runs", lambda *_: pytest.fail("not read together"))
    for config, (_, since, sizes), right in zip(configs, cases, expected, strict=True):
        assert same(served(config, since, **sizes), right)


def test_packed_files_may_exist_for_only_some_shards(make_corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_corpus(drawn(2), shards=4)
    config = DataConfig(corpus=str(directory), prefetch=0)
    expected = served(config)
    pack(directory, 1, 2)
    for number in (1, 2):
        tar = directory / f"train-{number:06d}.tar"
        tar.write_bytes(bytes(tar.stat().st_size))
    monkeypatch.setattr(RowReader, "_read_by_runs", lambda *_: pytest.fail("not read together"))
    assert same(served(config), expected)


@pytest.mark.parametrize("byte", [0, 17_000, 50_001])
def test_damaged_packed_file_is_reported_once_and_replaced_by_the_tar(
    make_corpus: Any, caplog: pytest.LogCaptureFixture, byte: int
) -> None:
    directory = make_corpus(SHORT)
    config = DataConfig(corpus=str(directory), on_bad_shard="skip", prefetch=0)
    expected = served(config)
    pack(directory)
    written = (directory / PACKED).read_bytes()[byte]
    flip(directory / PACKED, byte)
    for each in (config, strict(config)):
        caplog.clear()
        assert same(served(each), expected)
        (message,) = caplog.messages
        assert f"{PACKED}: byte {byte} is 0x{written ^ 4:02x} where 0x{written:02x} was written" in message
        assert f"read from {TAR} instead" in message


def test_damage_in_packed_file_and_tar_is_an_error_or_skipped(make_corpus: Any) -> None:
    directory = make_corpus(SHORT)
    config = DataConfig(corpus=str(directory), on_bad_shard="skip", prefetch=0)
    byte = int(ShardIndex.read(directory / "train-000000.idx").offsets[2]) + 1000
    pack(directory)
    flip(directory / TAR, byte)
    whole = served(strict(config))  # everything is read from the packed file
    flip(directory / PACKED, 2 * 20_300 + 1000)
    with pytest.raises(ShardError, match=rf"{TAR}: 00000002\.tok\.npy: byte {byte} "):
        served(strict(config))
    (directory / PACKED).unlink()
    left_out = served(config)
    assert len(left_out[1]) == 1 and f"byte {byte} " in left_out[1][0] and not same(whole, left_out)


@pytest.mark.parametrize("harm", ["tail", "cut", "longer", "empty", "of another shard", "missing"])
def test_packed_file_that_does_not_match_its_shard_is_not_used(
    make_corpus: Any, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    directory = make_corpus(SHORT)
    config = DataConfig(corpus=str(directory), prefetch=0)
    expected = served(config)
    pack(directory)
    path = directory / PACKED
    size = path.stat().st_size
    if harm == "tail":
        flip(path, size - 60)
    elif harm == "of another shard":  # the same lengths give the same file size
        other = make_corpus(SHORT, name="other", start=1)
        pack(other)
        shutil.copyfile(other / PACKED, path)
    elif harm == "missing":
        path.unlink()
    else:
        os.truncate(path, {"cut": size - 4, "longer": size + 4, "empty": 0}[harm])
    assert same(served(config), expected)
    assert [PACKED in message for message in caplog.messages] == [True] * (harm != "missing")


def test_packed_file_truncated_while_mapped_is_replaced_by_its_tar(
    make_corpus: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Access to mapped pages beyond its end would kill the process (SIGBUS)."""
    directory = make_corpus([3000] * 600, shards=1)
    config = DataConfig(corpus=str(directory), prefetch=0)
    share = Share(length=2048, rows=256, micro_rows=256)
    expected = Loader(config, open_corpora(config), share, block=64, seed=3)
    tokens = [expected.batches(step)[0].input_ids for step in range(3)]
    pack(directory)
    loader = Loader(config, open_corpora(config), share, block=64, seed=3)
    assert np.array_equal(loader.batches(0)[0].input_ids, tokens[0])
    os.truncate(directory / PACKED, 8192)
    assert all(np.array_equal(loader.batches(step)[0].input_ids, tokens[step]) for step in (1, 2))
    (message,) = caplog.messages
    assert PACKED in message and "8192 bytes, expected" in message


def test_packed_damage_is_located_by_comparison_with_the_tar(make_corpus: Any) -> None:
    directory = make_corpus(SHORT, shards=1)
    pack(directory)
    path, index = directory / PACKED, ShardIndex.read(directory / "train-000000.idx")
    whole = path.read_bytes()
    assert packed_name(TAR) == PACKED and packed_damage(directory / TAR, index) is None
    flip(path, 30_000)
    assert packed_damage(directory / TAR, index) == (
        f"byte 30000 is 0x{whole[30_000] ^ 4:02x}, but 0x{whole[30_000]:02x} in the tar"
    )
    path.write_bytes(whole[:-1])
    assert packed_damage(directory / TAR, index) == f"cut short at byte {len(whole) - 1}"
    path.write_bytes(whole + b"0")
    assert packed_damage(directory / TAR, index) == f"goes on after byte {len(whole)}, where it should end"
    path.unlink()
    assert packed_damage(directory / TAR, index) == "missing"
