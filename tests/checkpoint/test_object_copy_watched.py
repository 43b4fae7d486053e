"""`bst ckpt push` beside a run: --watch, and checkpoints that the run removes meanwhile."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bst_base.errors import StorageError
from bst_dist.checkpoint.directory import directory, require_intact
from bst_dist.checkpoint.object_copy import RunCopy
from tests.checkpoint.pushing import push


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/store/demo"


def polls(monkeypatch, *between: Callable[[], object]) -> None:
    """Let `push --watch` call these between its polls instead of sleeping."""
    waiting = iter(between)
    monkeypatch.setattr("bst_dist.checkpoint.commands.push.time.sleep", lambda _: next(waiting)())


def finish(run: Path) -> None:
    (run / "outcome.json").write_text(json.dumps({"finished": True}))


def test_push_watch_ends_when_the_run_finishes(older, url, monkeypatch):
    """Each new checkpoint is sent while the run continues, and the last one when it has finished."""
    naps = []

    def nap(_):
        naps.append(RunCopy(url).steps())
        shutil.copytree(directory(older, 4), directory(older, 4 + len(naps)))
        if len(naps) == 2:
            finish(older)

    monkeypatch.setattr("bst_dist.checkpoint.commands.push.time.sleep", nap)
    assert push(older, url, "--watch") == 0
    assert naps == [[4], [5, 4]]
    assert RunCopy(url).steps() == [6, 5]


def test_push_watch_sends_the_run_s_files_when_a_start_ends(older, url, tmp_path, monkeypatch):
    """Also without a new checkpoint, and when the run was stopped and may continue."""

    def there() -> list[bytes]:
        return [(tmp_path / "store" / "demo" / name).read_bytes() for name in ("metrics.jsonl", "outcome.json")]

    def stops():
        (older / "metrics.jsonl").write_text('{"step": 5}\n')
        (older / "outcome.json").write_text('{"finished": false, "stopped": "SIGTERM"}')

    def ends():
        assert there() == [b'{"step": 5}\n', b'{"finished": false, "stopped": "SIGTERM"}']
        (older / "metrics.jsonl").write_text('{"step": 6}\n')
        finish(older)

    polls(monkeypatch, stops, ends)
    assert push(older, url, "--watch") == 0
    assert there() == [b'{"step": 6}\n', b'{"finished": true}']


def test_push_watch_waits_for_the_first_checkpoint(older, url, tmp_path, monkeypatch):
    directory(older, 4).rename(tmp_path / "later")
    polls(monkeypatch, lambda: ((tmp_path / "later").rename(directory(older, 4)), finish(older)))
    assert push(older, url, "--watch") == 0
    assert RunCopy(url).steps() == [4]


def test_push_watch_tries_again_after_an_error_of_the_store(older, url, monkeypatch, capsys):
    put, failing = RunCopy._put, [True]

    def fails(self, path, name):
        if failing:
            raise StorageError("s3://runs/demo: cannot write: the network is gone")
        return put(self, path, name)

    monkeypatch.setattr(RunCopy, "_put", fails)
    polls(monkeypatch, lambda: (failing.clear(), finish(older)))
    assert push(older, url, "--watch") == 0
    assert "cannot write: the network is gone; trying again in 20 s" in capsys.readouterr().out
    assert RunCopy(url).steps() == [4]


def test_push_continues_with_the_newest_if_a_checkpoint_is_removed_while_it_is_read(older, url, monkeypatch, capsys):
    def removed(checkpoint):
        if checkpoint == directory(older, 4):
            shutil.copytree(checkpoint, directory(older, 5))
            shutil.rmtree(checkpoint)
        require_intact(checkpoint)

    monkeypatch.setattr("bst_dist.checkpoint.object_copy.require_intact", removed)
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [5]
    assert "checkpoint 4 was removed by the run" in capsys.readouterr().out


def test_push_continues_with_the_newest_if_a_checkpoint_is_removed(older, url, monkeypatch, capsys):
    put = RunCopy._put

    def removed(self, path, name):
        if path.parent == directory(older, 4):
            shutil.copytree(directory(older, 4), directory(older, 5))
            shutil.rmtree(directory(older, 4))
        return put(self, path, name)

    monkeypatch.setattr("bst_dist.checkpoint.object_copy._TRANSFERS", 1)
    monkeypatch.setattr(RunCopy, "_put", removed)
    assert push(older, url) == 0
    assert RunCopy(url).steps() == [5]
    assert "checkpoint 4 was removed by the run" in capsys.readouterr().out


def test_push_watch_tries_again_while_the_file_system_of_the_run_is_gone(older, url, tmp_path, monkeypatch, capsys):
    """Whether its directory is empty, or reading fails: both can pass."""
    away = tmp_path / "away"
    read, failing = Path.read_bytes, []

    def fails(path: Path) -> bytes:
        if failing and path.name in ("environment.json", "outcome.json"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    def unmounted() -> None:
        older.rename(away)
        older.mkdir()

    def mounted() -> None:
        older.rmdir()
        away.rename(older)
        failing.append(True)
        finish(older)

    monkeypatch.setattr(Path, "read_bytes", fails)
    polls(monkeypatch, unmounted, mounted, failing.clear)
    assert push(older, url, "--watch") == 0
    said = capsys.readouterr().out
    assert f"{older}: recipe.yaml is missing: is its file system mounted?; trying again in 20 s" in said
    assert f"cannot read {older}/outcome.json: Input/output error; trying again in 20 s" in said
    assert (tmp_path / "store" / "demo" / "outcome.json").exists()


def test_push_watch_ends_when_the_run_has_diverged(older, url, tmp_path, monkeypatch):
    (older / "outcome.json").write_text(json.dumps({"finished": False, "diverged": "the loss is nan"}))
    polls(monkeypatch)
    assert push(older, url, "--watch") == 0
    assert (tmp_path / "store" / "demo" / "outcome.json").read_bytes() == (older / "outcome.json").read_bytes()
