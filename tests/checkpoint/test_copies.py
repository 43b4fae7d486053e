"""`bst ckpt push` and `bst ckpt pull` as a user runs them: copy a run to an object store and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import s3fs

from bst_base.errors import StorageError, UserError
from bst_dist.checkpoint.copies import RunCopy
from bst_dist.checkpoint.directory import damage, directory
from bst_dist.cli import main
from tests.checkpoint.damage import flip

STEP = "checkpoints/step-00000004"


def push(run: Path, url: str, *more: str) -> int:
    return main(["ckpt", "push", str(run), url, *more])


def pull(url: str, run: Path, *more: str) -> int:
    return main(["ckpt", "pull", url, str(run), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/store/demo"


def earlier(run: Path, step: int) -> None:
    """Give the run a valid checkpoint of an earlier step."""
    shutil.copytree(directory(run, 4), directory(run, step))


def test_push_and_pull_restore_a_run_byte_for_byte(older, url, tmp_path):
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0
    there = contents(older)
    assert contents(tmp_path / "back") == {name: data for name, data in there.items() if "heartbeats" not in name}


@pytest.mark.ranks
def test_a_pulled_run_can_be_resumed(bst, older, url, tmp_path):
    assert push(older, url) == 0
    shutil.rmtree(older)
    assert pull(url, older) == 0
    done = bst("train", "run/recipe.yaml", "--resume", "--ranks", 2, "--run-dir", "run")
    assert done.returncode == 0, done.stdout
    assert "resumed from step 4" in done.stdout


def test_push_and_pull_work_with_s3(older, s3_endpoint, tmp_path, monkeypatch):
    server = s3_endpoint()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", server["client_kwargs"]["region_name"])
    s3fs.S3FileSystem(**server).mkdir("runs")
    assert push(older, "s3://runs/demo") == 0
    assert RunCopy("s3://runs/demo").steps() == [4]
    assert pull("s3://runs/demo", tmp_path / "back") == 0
    assert contents(directory(tmp_path / "back", 4)) == contents(directory(older, 4))


def test_an_interrupted_push_leaves_no_checkpoint_and_can_be_repeated(older, url, tmp_path, monkeypatch, capsys):
    put, sent = RunCopy._put, []

    def fails(self, path, name):
        sent.append(name)
        if len(sent) == 3:
            raise StorageError("the network is gone")
        return put(self, path, name)

    monkeypatch.setattr(RunCopy, "_put", fails)
    with pytest.raises(StorageError):
        RunCopy(url).put_checkpoint(directory(older, 4))
    monkeypatch.undo()
    assert RunCopy(url).steps() == []
    assert pull(url, tmp_path / "back") == 2
    assert "no complete checkpoint; there are: none" in capsys.readouterr().err
    assert push(older, url) == 0
    assert pull(url, tmp_path / "back") == 0


def test_the_manifest_is_sent_after_all_other_files(older, url, monkeypatch):
    sent, put = [], RunCopy._put
    monkeypatch.setattr(RunCopy, "_put", lambda self, path, name: (put(self, path, name), sent.append(name))[0])
    RunCopy(url).put_checkpoint(directory(older, 4))
    assert sent[-1] == f"{STEP}/manifest.json" and len(sent) == 1 + len(manifest_of(older)["files"])


def manifest_of(run: Path) -> dict:
    return json.loads((directory(run, 4) / "manifest.json").read_text())


def test_damaged_checkpoints_are_neither_pushed_nor_pulled(older, url, tmp_path, capsys):
    assert push(older, url) == 0
    weights = tmp_path / "store" / "demo" / STEP / "weights-00001.safetensors"
    flip(weights)
    assert pull(url, tmp_path / "back") == 2
    assert "checksum mismatch in rank 1's file weights-00001.safetensors" in capsys.readouterr().err
    assert not directory(tmp_path / "back", 4).exists()
    flip(directory(older, 4) / "weights-00000.safetensors")
    assert push(older, f"{url}-2") == 2
    assert "checksum mismatch in rank 0's file weights-00000.safetensors" in capsys.readouterr().err
    assert RunCopy(f"{url}-2").steps() == []


def test_the_copy_keeps_only_newest_and_pinned_checkpoints(older, url, capsys):
    for step in (1, 2, 3):
        earlier(older, step)
        if step == 1:
            assert main(["ckpt", "pin", str(older), "--step", "1"]) == 0
        assert push(older, url, "--step", str(step)) == 0
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [4, 3, 1]
    assert "checkpoint 2 removed" in capsys.readouterr().out


def test_a_second_push_sends_nothing(older, url, capsys):
    assert push(older, url) == 0
    capsys.readouterr()
    assert push(older, url) == 0
    assert "sent" not in capsys.readouterr().out


def test_push_watch_ends_when_the_run_finishes(older, url, monkeypatch):
    """Each new checkpoint is sent while the run continues, and the last one when it has finished."""
    naps = []

    def nap(_):
        naps.append(RunCopy(url).steps())
        shutil.copytree(directory(older, 4), directory(older, 4 + len(naps)))
        if len(naps) == 2:
            (older / "outcome.json").write_text(json.dumps({"finished": True}))

    monkeypatch.setattr("bst_dist.checkpoint.commands.push.time.sleep", nap)
    assert push(older, url, "--watch") == 0
    assert naps == [[4], [5, 4]]
    assert RunCopy(url).steps() == [6, 5]


def test_push_continues_with_the_newest_if_a_checkpoint_is_removed(older, url, monkeypatch, capsys):
    put = RunCopy._put

    def removed(self, path, name):
        if path.parent == directory(older, 4):
            shutil.copytree(directory(older, 4), directory(older, 5))
            shutil.rmtree(directory(older, 4))
        return put(self, path, name)

    monkeypatch.setattr("bst_dist.checkpoint.copies._TRANSFERS", 1)
    monkeypatch.setattr(RunCopy, "_put", removed)
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [5]
    assert "checkpoint 4 was removed by the run" in capsys.readouterr().out


def test_pull_refuses_the_directory_of_another_run(older, url, tmp_path, capsys):
    assert push(older, url) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.yaml").write_text("name: other\n")
    assert pull(url, tmp_path / "other") == 2
    assert "another recipe" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--watch", "--step", "4"], ["--keep", "0"]])
def test_invalid_push_options_are_refused(older, url, arguments, capsys):
    assert push(older, url, *arguments) == 2
    assert capsys.readouterr().err


def test_a_local_path_is_refused_as_address(older, tmp_path):
    with pytest.raises(UserError, match="not an address"):
        RunCopy(str(tmp_path))


def test_storage_errors_name_the_file(older, tmp_path, capsys):
    (tmp_path / "store").write_text("in the way")
    assert push(older, f"file://{tmp_path}/store/demo") == 74
    assert "store/demo" in capsys.readouterr().err


def test_pull_fetches_the_complete_checkpoint_of_a_step(older, url, tmp_path):
    push(older, url)
    assert pull(url, tmp_path / "back", "--step", "4") == 0
    assert damage(directory(tmp_path / "back", 4)) == []
    assert pull(url, tmp_path / "back", "--step", "9") == 2
