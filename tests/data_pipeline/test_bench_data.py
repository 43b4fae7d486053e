"""The data of `bst bench data`: the same sequences for every reader, from documents of the requested length."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.bench import readers
from data_pipeline.bench.material import sequences_of
from data_pipeline.serve.reader import Corpus


@pytest.mark.parametrize("mean", [300, 20_000])
def test_all_readers_serve_the_same_sequences(tmp_path: Path, mean: int) -> None:
    for reader in ("ours", "ours-as-stored", "webdataset"):
        readers.make(reader, tmp_path, 64, mean)
    lengths = Corpus.open(str(tmp_path / "ours")).lengths
    assert lengths.sum() == 64 * readers.LENGTH + 1
    if mean == 300:
        assert lengths.mean() == pytest.approx(mean, rel=0.2)  # 870 of them, log-normal
    expected = {row.tobytes() for row in sequences_of(tmp_path / "ours", readers.LENGTH)}
    assert len(expected) == 64
    for reader in (readers.OursAsStored, readers.WebDataset):
        readers.leave_page_cache(tmp_path)
        found = [np.asarray(row).tobytes() for rows in reader(tmp_path, 64, 0, 1, None) for row in rows]
        assert set(found) == expected and len(found) == 64


def pages_in_memory(path: Path) -> int:
    """Return the number of a file's pages in memory, according to `fincore` of util-linux."""
    return int(subprocess.run(["fincore", "-nro", "pages", path], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not shutil.which("fincore"), reason="util-linux is not here")
def test_benchmark_loads_all_files_into_the_page_cache_before_measuring(tmp_path: Path, monkeypatch, capsys) -> None:
    copy = tmp_path / "ours"
    readers.make("ours", tmp_path, 64, 20_000)
    (shard,) = copy.glob("train-*.tar")
    readers.leave_page_cache(copy)
    before, seen = pages_in_memory(shard), []
    monkeypatch.setattr(readers, "speed", lambda *_: seen.append(pages_in_memory(shard)) or {})
    monkeypatch.setattr(sys, "argv", ["readers", "ours", "speed", str(tmp_path), "--sequences", "64"])
    monkeypatch.setattr(os, "_exit", lambda _: None)
    readers.main()
    assert seen == [-(-shard.stat().st_size // os.sysconf("SC_PAGESIZE"))]
    assert before < seen[0]
