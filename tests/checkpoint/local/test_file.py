"""The file of a local copy: written whole or not at all, and rejected when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bst_dist.checkpoint.directory import CheckpointError
from bst_dist.checkpoint.local import file
from bst_dist.checkpoint.local.file import Key, LocalCopy
from tests.checkpoint.damage import flip
from tests.checkpoint.local.written_copy import full, write


def test_a_copy_is_read_as_it_was_written(tmp_path):
    own = write(tmp_path / "a" / "rank-00001")
    copy = LocalCopy(tmp_path / "a" / "rank-00001")
    assert copy.intact()
    assert copy.manifest["step"] == 7
    assert torch.equal(copy.rank_state()["rng"]["torch"], own["rng"]["torch"])
    for place, name in enumerate(("weight/a", "exp_avg/a", "exp_avg_sq/a")):
        into = torch.empty(3)
        copy.shards().fill([(name, 6, into)])
        assert into.tolist() == [1.0 + place, 2.0 + place, 3.0 + place]


def test_a_truncated_or_changed_copy_is_rejected(tmp_path):
    path = tmp_path / "rank-00000"
    write(path)
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 97), len(whole) - 1]:
        for torn in (whole[:place], whole[:place] + bytes(len(whole) - place)):
            path.write_bytes(torn)
            assert not trusted(path) or torn == whole
        path.write_bytes(whole)
        flip(path, place)
        assert not trusted(path)


def trusted(path: Path) -> bool:
    try:
        return LocalCopy(path).intact()
    except CheckpointError:
        return False


def test_a_writer_that_fails_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(file, "write", lambda *_: full())
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "rank-00000")
    assert not list(tmp_path.iterdir())


def test_a_key_is_read_back_from_its_text():
    assert Key.of(str(Key(3, 12, 4))) == Key(3, 12, 4)
    assert Key.of("step-00000012") is None
    assert max(Key(0, 12, 4), Key(3, 8, 2)) == Key(3, 8, 2)  # newer: more steps were skipped in a roll-back
