"""What `bst bench data` measures on: the same sequences for every reader, of documents of the length asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.bench import readers
from data_pipeline.bench.material import sequences_of
from data_pipeline.serve.reader import Corpus


@pytest.mark.parametrize("mean", [300, 20_000])
def test_readers_serve_the_same_sequences_of_short_and_long_documents(tmp_path: Path, mean: int) -> None:
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
