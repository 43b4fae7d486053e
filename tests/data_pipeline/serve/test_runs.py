"""Rows read together from mapped shards equal the same rows read run by run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.format.shards import ShardError, ShardIndex
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.rows import RowReader
from data_pipeline.serve.share import Share
from data_pipeline.serve.slices import slices_of
from data_pipeline.store.mapped import Collector, MappedFile
from data_pipeline.store.storage import LocalStorage

TAR = "train-000000.tar"


def drawn(seed: int) -> list[int]:
    """Return random document lengths: a few tokens, about one block of 8192, and several blocks."""
    rng = np.random.default_rng(seed)
    kinds = [rng.integers(1, 300, 40), rng.integers(8190, 8195, 3), rng.integers(1, 40_000, 2), [8192, 16_384]]
    return rng.permutation(np.concatenate(kinds)).tolist()


def served(config: DataConfig, since: int = 0, **sizes: int) -> tuple[list[Any], list[str]]:
    """Return the content of the batches of twelve steps, and the data that was skipped."""
    share = Share(**{"length": 2048, "rows": 6, "micro_rows": 2} | sizes)
    loader = Loader(config, open_corpora(config), share, block=64, seed=3)
    micro_batches = [batch for step in range(since, since + 12) for batch in loader.batches(step)]
    batches = [batch for each in micro_batches for batch in slices_of(each)]
    found = [(b.input_ids, b.labels, b.loss_mask, b.documents, b.continues, b.epochs) for b in batches]
    return found, loader.bad


def by_runs(config: DataConfig, since: int = 0, **sizes: int) -> tuple[list[Any], list[str]]:
    """Return the same if no file can be mapped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "mapped", lambda *_: None)
        return served(config, since, **sizes)


def same(one: tuple[list[Any], list[str]], other: tuple[list[Any], list[str]]) -> bool:
    pairs = [pair for each in zip(one[0], other[0], strict=True) for pair in zip(*each, strict=True)]
    return one[1] == other[1] and all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("settings", [{}, {"documents": "isolated"}, {"mode": "streaming"}, {"packing": "best_fit"}])
def test_rows_read_together_equal_rows_read_run_by_run(
    make_corpus: Any, monkeypatch: pytest.MonkeyPatch, dtype: str, settings: dict[str, str]
) -> None:
    one, other = (str(make_corpus(drawn(seed), name=f"c{seed}", shards=3, dtype=dtype)) for seed in range(2))
    mixed = [{"corpus": one, "weight": 0.7}, {"corpus": other, "weight": 0.3}]
    for corpus, since, sizes in (
        (one, 0, {}),
        (one, 5, {"slice_tokens": 512, "dp": 4}),
        (mixed, 11, {"sp": 2, "sp_rank": 1}),
    ):
        config = DataConfig(corpus=corpus, prefetch=0, **settings)
        expected = by_runs(config, since, **sizes)
        with monkeypatch.context() as patch:
            patch.setattr(RowReader, "_read_by_runs", lambda *_: pytest.fail("not read together"))
            assert same(served(config, since, **sizes), expected)


@pytest.mark.parametrize("document, byte", [(0, 0), (2, 1799), (1, 17_000), (5, 9_999)])
def test_damage_is_skipped_equally_in_both_ways_of_reading(make_corpus: Any, document: int, byte: int) -> None:
    """Damage in documents that rows contain completely and in documents that they cut, one of several blocks."""
    directory = make_corpus([300, 20_000, 900, 150, 40, 5000] * 2)
    config = DataConfig(corpus=str(directory), on_bad_shard="skip", prefetch=0)
    good = served(config)
    index = ShardIndex.read(directory / "train-000000.idx")
    place = int(index.offsets[document]) + byte
    data = bytearray((directory / TAR).read_bytes())
    data[place] ^= 4
    (directory / TAR).write_bytes(data)
    found = served(config)
    assert len(found[1]) == 1 and f"byte {place} " in found[1][0]
    assert not same(found, good)
    assert same(found, by_runs(config))
    with pytest.raises(ShardError, match=f"byte {place} "):
        served(config.model_copy(update={"on_bad_shard": "stop"}))


def test_tar_truncated_while_mapped_is_an_error_not_a_crash(make_corpus: Any) -> None:
    """Access to mapped pages beyond its end would kill the process (SIGBUS)."""
    directory = make_corpus([3000] * 600)
    config = DataConfig(corpus=str(directory), on_bad_shard="skip", prefetch=0)
    loader = Loader(config, open_corpora(config), Share(length=2048, rows=256, micro_rows=256), block=64, seed=3)
    (whole,) = loader.batches(0)  # the rows of one step are read together
    assert not loader.bad
    os.truncate(directory / TAR, 8192)
    (cut,) = loader.batches(1)
    assert whole.loss_mask.sum() > 255 * 2048 and cut.loss_mask.any() and not cut.loss_mask.all()
    assert loader.bad and all("cut short: it ends before" in message for message in loader.bad)


def test_collector_copies_runs_and_detects_unreadable_pages(tmp_path: Path) -> None:
    path, size, collector = tmp_path / "file", 3 << 20, Collector()
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    path.write_bytes(data.tobytes())
    file = MappedFile(path)
    starts = np.random.default_rng(1).integers(0, size - 900, 3000)  # more than fits in one call
    sizes = np.random.default_rng(2).integers(0, 900, 3000)
    found = collector.collect(file.address + starts, sizes)
    assert np.array_equal(found, np.concatenate([data[a : a + n] for a, n in zip(starts, sizes, strict=True)]))
    os.truncate(path, 4096)
    assert np.array_equal(collector.collect(np.array([file.address]), np.array([4096])), data[:4096])
    for start in (4095, 5000, size - 10):
        assert collector.collect(np.array([file.address, file.address + start]), np.array([10, 10])) is None
    with pytest.raises(OSError, match="cannot be mapped"):
        MappedFile(Path("/dev/null"))


def test_collected_memory_is_not_reused_while_referenced(tmp_path: Path) -> None:
    path, collector = tmp_path / "file", Collector()
    path.write_bytes(bytes(range(256)) * 4096)
    file = MappedFile(path)

    def collect(first: int) -> np.ndarray:
        found = collector.collect(np.array([file.address + first]), np.array([4096]))
        assert found is not None and found[0] == first
        return found

    rows = collect(1).view(np.uint16).reshape(16, 128)[3:5]  # a view of the first result
    kept = rows.copy()
    places = {collect(number).ctypes.data for number in range(2, 8)}
    assert len(places) == 1 and rows.ctypes.data - 3 * 256 not in places  # buffers are reused unless still referenced
    assert np.array_equal(rows, kept)
    held = [collect(number) for number in range(8)]
    assert [found[0] for found in held] == list(range(8))
    assert np.array_equal(rows, kept)


def test_rows_that_were_served_do_not_change(make_corpus: Any) -> None:
    """Their memory is reused for later rows only when nothing refers to them any more."""
    config = DataConfig(corpus=str(make_corpus(drawn(4), shards=3)), prefetch=0)
    share = Share(length=256, rows=8, micro_rows=4)
    loader = Loader(config, open_corpora(config), share, block=64, seed=3)
    held = [tokens for step in range(200) for tokens in loader.tokens(step)]
    alone = Loader(config, open_corpora(config), share, block=64, seed=3)
    for number, tokens in enumerate(held):
        assert np.array_equal(tokens, alone.tokens(number // 2)[number % 2])
