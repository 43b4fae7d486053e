"""`bst ckpt push` and `pull` when a run has gone back to an earlier step, and with another run."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from bst_base.errors import StorageError
from bst_dist.checkpoint.directory import damage, directory, is_full, read_manifest
from bst_dist.checkpoint.object_copy import RunCopy
from bst_dist.checkpoint.retention import CheckpointEntry, abandon, keep_only_weights, remove_leftovers
from bst_dist.faults.ledger import Entry
from tests.checkpoint.pushing import contents, only_weights, pull, push, taken


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/store/demo"


def rolled_back(run: Path, step: int, to: int) -> None:
    """Roll the run back as the guard does, when it rejects the step after `step`."""
    entry = Entry(step + 1, 0, "the loss is nan", "roll-back", back_to=to)
    (run / "ledger.jsonl").write_text(json.dumps(asdict(entry)) + "\n")
    abandon(run, to)
    remove_leftovers(run)


def started_again(run: Path, step: int) -> None:
    """Remove the checkpoints after `step`, and record a start that resumed from there."""
    environment = json.loads((run / "environment.json").read_text())
    environment["starts"].append({"time": "2027-01-01T00:00:00Z", "from_step": step})
    (run / "environment.json").write_text(json.dumps(environment))
    abandon(run, step)
    remove_leftovers(run)


@pytest.mark.parametrize("before", [b"before", b"other"], ids=["other files", "equal files with other data skipped"])
def test_a_retaken_checkpoint_replaces_the_one_in_the_store(older, url, tmp_path, before):
    taken(older, 4, before)
    assert push(older, url) == 0
    taken(older, 4, b"other", skipped=3)
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0
    assert contents(directory(tmp_path / "back", 4)) == contents(directory(older, 4))


def test_an_interrupted_replacement_leaves_no_checkpoint(older, url, monkeypatch):
    """Neither the old one nor a mixture of both: files of the two have the same names."""
    assert push(older, url) == 0
    taken(older, 4, skipped=3)
    put = RunCopy._put

    def fails(self, path, name):
        if name.endswith("weights-00001.safetensors"):
            raise StorageError("the network is gone")
        return put(self, path, name)

    monkeypatch.setattr(RunCopy, "_put", fails)
    assert push(older, url) == 74
    assert RunCopy(url).steps() == []
    monkeypatch.undo()
    assert push(older, url) == 0
    assert RunCopy(url).manifest(4)["skipped"] == 3


def test_a_checkpoint_that_changes_while_it_is_sent_is_sent_again(older, url, monkeypatch):
    put = RunCopy._put

    def changes(self, path, name):
        if path.name == "weights-00001.safetensors" and read_manifest(path.parent)["skipped"] == 0:
            taken(older, 4, skipped=3)
        return put(self, path, name)

    monkeypatch.setattr("bst_dist.checkpoint.object_copy._TRANSFERS", 1)
    monkeypatch.setattr(RunCopy, "_put", changes)
    assert push(older, url) == 0
    store = Path(url.removeprefix("file://"))
    assert damage(directory(store, 4)) == [] and read_manifest(directory(store, 4))["skipped"] == 3


def test_the_copy_of_a_checkpoint_keeps_what_retention_has_removed(older, url):
    assert push(older, url) == 0
    keep_only_weights(CheckpointEntry(directory(older, 4), read_manifest(directory(older, 4))))
    assert push(older, url) == 0
    assert is_full(RunCopy(url).manifest(4))


@pytest.mark.parametrize("goes_back", [lambda run: rolled_back(run, 4, to=2), lambda run: started_again(run, 2)])
def test_the_copy_follows_a_run_that_goes_back(older, url, tmp_path, goes_back):
    """Checkpoints from before are removed, also those that the run has not taken again yet."""
    for step in (2, 3):
        taken(older, step)
        assert push(older, url, "--step", str(step)) == 0
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [4, 3]
    goes_back(older)
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [2]
    assert pull(url, tmp_path / "back") == 0
    assert directory(tmp_path / "back", 2).is_dir()
    shutil.copytree(directory(older, 2), directory(older, 3))
    taken(older, 3, b"again", skipped=3, time="2027-02-01T00:00:00Z")
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [3, 2]
    shutil.copytree(directory(older, 3), directory(older, 4))
    taken(older, 4, b"again", skipped=3, time="2027-02-01T00:00:00Z")
    shutil.rmtree(directory(older, 3))  # by retention: it is still a checkpoint of the run
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [4, 3]


def test_a_checkpoint_retaken_with_equal_files_stays_in_the_store(older, url, capsys):
    taken(older, 2)
    assert push(older, url) == 0
    retaken = directory(older, 4).rename(older / "retaken")
    started_again(older, 2)
    retaken.rename(directory(older, 4))
    capsys.readouterr()
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [4]
    assert "checkpoint 4" not in capsys.readouterr().out


def test_full_checkpoints_stay_until_the_run_that_went_back_has_another(older, url):
    assert push(older, url) == 0
    only_weights(older, 1)
    started_again(older, 1)
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [4, 1]


def test_a_checkpoint_that_the_run_has_lost_stays_in_the_store(older, url):
    """It is the only one left; and the newest of the run is not removed in its place."""
    taken(older, 3)
    assert push(older, url) == 0
    shutil.rmtree(directory(older, 4))
    assert push(older, url, "--keep", "1") == 0
    assert RunCopy(url).steps() == [4, 3]


def test_another_run_is_not_pushed_to_the_same_place(older, url, tmp_path, capsys):
    assert push(older, url) == 0
    other = tmp_path / "other"
    shutil.copytree(older, other)
    environment = json.loads((other / "environment.json").read_text())
    environment["starts"][0] |= {"time": "2026-11-26T08:00:00Z", "hosts": ["node-07"]}
    (other / "environment.json").write_text(json.dumps(environment))
    before = contents(tmp_path / "store")
    assert push(other, url) == 2
    said = capsys.readouterr().err
    assert f"{url}: holds another run than {other}" in said and "choose another URL" in said
    assert "2026-11-26T08:00:00Z" in said and "2026-11-25T18:41:01Z" in said
    (other / "environment.json").unlink()
    (other / "recipe.yaml").write_text((other / "recipe.yaml").read_text().replace("seed: ", "seed: 1"))
    assert push(other, url) == 2
    assert "another recipe" in capsys.readouterr().err
    assert contents(tmp_path / "store") == before


def test_a_run_whose_settings_have_changed_is_still_the_same(older, url, tmp_path):
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0
    (older / "recipe.yaml").write_text((older / "recipe.yaml").read_text() + "# another learning rate\n")
    taken(older, 5)
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0
    assert directory(tmp_path / "back", 5).is_dir()


def test_pull_refuses_to_mix_two_states_of_one_step(older, url, tmp_path, capsys):
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0
    assert pull(url, tmp_path / "back") == 0
    assert "already exists" in capsys.readouterr().out
    taken(older, 4, skipped=3)
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 2
    assert "is not the checkpoint that" in capsys.readouterr().err


def test_a_copy_that_was_cut_off_is_sent_again(older, url, tmp_path, capsys):
    """A store on a file system can have the beginning of a file."""
    assert push(older, url) == 0
    for name in ("environment.json", "checkpoints/step-00000004/manifest.json"):
        (tmp_path / "store" / "demo" / name).write_text("{")
    assert pull(url, tmp_path / "back") == 2
    assert "manifest.json: not JSON" in capsys.readouterr().err
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0
