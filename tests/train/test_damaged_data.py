"""Training on damaged data, as a user sees it."""

from __future__ import annotations

import re
import shutil

import pytest

from bst_dist.cli import main


@pytest.mark.ranks
def test_each_warning_of_damaged_data_names_its_rank(recipe_file, corpus, tmp_path, capfd):
    """Both ranks read from the same shard, in which every block is damaged."""
    shutil.copytree(corpus, tmp_path / "damaged")
    for path in (*(tmp_path / "damaged").glob("train-*.tar"), *(tmp_path / "damaged").glob("train-*.tokens")):
        data = bytearray(path.read_bytes())
        data[::50] = bytes(byte ^ 1 for byte in data[::50])
        path.write_bytes(data)
    data = {"corpus": str(tmp_path / "damaged"), "on_bad_shard": "skip"}
    assert main(["train", str(recipe_file(data=data)), "--run-dir", str(tmp_path / "run"), "--ranks", "2"]) == 0
    warned = [line for line in capfd.readouterr().err.splitlines() if "left out of the loss" in line]
    assert {re.match(r"rank ([01]): left out of the loss: ", line)[1] for line in warned} == {"0", "1"}
    assert len(warned) == len(set(warned))
