"""Short documents that are copied many at a time are those that are read one by one, and damage is no crash."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.format.shards import ShardError
from data_pipeline.serve import rows as serving
from data_pipeline.serve import spots
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import Loader, open_corpora
from data_pipeline.serve.share import Share

SHORT = [1 + int(length) for length in np.random.Generator(np.random.Philox(key=3)).lognormal(4, 1.2, 300)]
MIXED = [*SHORT[:150], 9000, 8192, 8193, 1, 1, 20_000, *SHORT[150:]]


def read(directory: Path, steps: int = 60, **settings: Any) -> list[np.ndarray]:
    """Everything that two ranks of a sequence are served, with their labels and masks."""
    config = DataConfig(**{"corpus": str(directory), "prefetch": 0, **settings})
    found = []
    for rank in range(2):
        share = Share(length=512, rows=3, micro_rows=2, sp_rank=rank, sp=2)
        loader = Loader(config, open_corpora(config), share, block=64, seed=1)
        for step in range(steps):
            for batch in loader.batches(step):
                found += [batch.input_ids, batch.labels, batch.loss_mask]
    return found


SETTINGS = [{}, {"documents": "isolated"}, {"documents": "masked"}, {"mode": "streaming"}, {"packing": "best_fit"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lengths", [SHORT, MIXED], ids=["short", "mixed"])
def test_what_is_served_is_what_is_read_one_by_one(
    make_corpus: Any, lengths: list[int], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_corpus(lengths)
    steps = 20 if "mode" in settings else 60
    together = read(directory, steps, **settings)
    monkeypatch.setattr(serving, "AVAILABLE", False)
    singly = read(directory, steps, **settings)
    assert len(together) == len(singly) > steps
    assert all(map(np.array_equal, together, singly))


def test_a_mixture_is_served_from_the_files_of_each_corpus(make_corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    each = {"short": SHORT, "reversed": SHORT[::-1], "mixed": MIXED}
    corpora = [{"corpus": str(make_corpus(lengths, name)), "weight": 1} for name, lengths in each.items()]
    together = read(Path(), corpus=corpora)
    monkeypatch.setattr(serving, "AVAILABLE", False)
    assert all(map(np.array_equal, together, read(Path(), corpus=corpora)))


def test_rows_of_more_pieces_than_one_call_takes_are_whole(make_corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_corpus(SHORT)
    expected = read(directory)
    monkeypatch.setattr(spots, "_AT_ONCE", 3)
    assert all(map(np.array_equal, expected, read(directory)))


@pytest.mark.parametrize("fault", ["error", "half", "changed"])
def test_what_the_kernel_does_not_copy_right_is_read_one_by_one(
    make_corpus: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    directory, real = make_corpus(SHORT), os.pwritev
    expected = read(directory)

    def copy(file: int, pieces: list[memoryview], offset: int) -> int:
        if fault == "error":
            raise OSError(14, "Bad address")
        if fault == "half":
            return real(file, pieces[: len(pieces) // 2], offset)
        return real(file, [bytes(len(pieces[0])), *pieces[1:]], offset)

    monkeypatch.setattr(os, "pwritev", copy)
    assert all(map(np.array_equal, expected, read(directory)))


def test_a_forked_process_has_room_of_its_own(make_corpus: Any) -> None:
    """What is copied lies in shared memory, where a child's next copy would replace its parent's."""
    read(make_corpus(SHORT), 1)
    data = spots._copies._data
    assert len(data) > 0
    child = os.fork()
    if not child:
        os._exit(len(spots._copies._data))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert spots._copies._data is data


@pytest.mark.parametrize("left", [0, 4096])
def test_a_mapped_shard_that_is_cut_while_it_is_read_ends_in_a_message(make_corpus: Any, left: int) -> None:
    """A process that touches a page beyond the end of a mapped file is killed by the kernel (SIGBUS)."""
    directory = make_corpus(SHORT)
    config = DataConfig(corpus=str(directory), prefetch=0)
    loader = Loader(config, open_corpora(config), Share(length=512, rows=3, micro_rows=3), block=64, seed=1)
    loader.batches(0)
    for tar in directory.glob("train-*.tar"):
        os.truncate(tar, left)
    with pytest.raises(ShardError, match="cut short"):
        for step in range(1, 60):
            loader.batches(step)
