"""A host whose ranks cannot all build the model in its memory at the same time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bst_dist.cli import main
from bst_dist.parallel.ranks import Ranks
from bst_dist.train.run import train
from bst_dist.train.start import host_memory
from bst_dist.train.start.host_memory import shortage, warn_of_shortage
from bst_dist.train.start.request import Request

GB = 10**9
START = SimpleNamespace(objective=SimpleNamespace(model=lambda: torch.nn.Linear(50_000, 10_000, bias=False)))
"""A start whose model takes 2 GB, which nothing here allocates."""


@pytest.mark.parametrize("available", [None, 8 * GB, 9 * GB])
def test_enough_or_unknown_memory_is_no_shortage(available):
    assert shortage(GB, 2, available) is None


@pytest.mark.parametrize(
    ("environment", "needed"),
    [
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, "8 ranks need 16.0 GB"),
        ({"LOCAL_RANK": "0", "LOCAL_SIZE": "4"}, "4 ranks need 8.0 GB"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "1 rank needs 2.0 GB"),
        ({"SLURM_LOCALID": "0"}, None),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, None),
    ],
)
def test_one_rank_of_a_host_warns(environment, needed, monkeypatch, capsys):
    for name in ("LOCAL_RANK", "SLURM_LOCALID", *host_memory.RANKS_OF_HOST):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(host_memory, "available_memory", lambda: GB)
    monkeypatch.setattr(host_memory.socket, "gethostname", lambda: "node-07")
    warn_of_shortage(START)
    found = capsys.readouterr().err
    if needed is None:
        assert found == ""
        return
    assert found.startswith(f"bst train: node-07: {needed} of host memory to build the model, 1.0 GB are available: ")
    monkeypatch.setattr(host_memory, "available_memory", lambda: 16 * GB)
    warn_of_shortage(START)
    assert capsys.readouterr().err == ""


def test_bst_train_check_has_a_line_for_too_little_memory(recipe_file, tmp_path, monkeypatch, capsys):
    command = ["train", str(recipe_file()), "--check", "--ranks", "2", "--run-dir", str(tmp_path / "run")]
    for available, lines in ((1, 1), (None, 0)):
        monkeypatch.setattr("bst_dist.cluster.local.available_memory", lambda available=available: available)
        assert main(command) == 0
        assert capsys.readouterr().out.count("\nmemory 2 ranks need ") == lines


@pytest.mark.ranks
def test_a_start_warns_before_it_builds_the_model(recipe_file, tmp_path, on_ranks, unmeasured, monkeypatch, capfd):
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def on_rank(ranks: Ranks) -> int:
        return train(Request(recipe_file(), [], tmp_path / "run", False, 1), ranks)

    assert on_ranks(2, on_rank) == [0, 0]
    said = capfd.readouterr().err
    assert said.count("of host memory to build the model, 1 B are available") == 1
