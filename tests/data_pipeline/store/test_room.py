"""The cache's directory: what killed processes leave there is removed, and what others write is not."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.store.cache import CachedStorage
from data_pipeline.store.locks import take_lock

SIZE = 10_000
FILES = {f"t{i}.tar": bytes([i]) * SIZE for i in range(6)}
KNOWN = {name: (SIZE, hashlib.sha256(data).hexdigest()) for name, data in FILES.items()}


class Source:
    """A storage of `FILES` that notes which files are fetched."""

    where, remote = "source", True

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def chunks(self, name: str, size: int | None) -> Iterator[bytes]:
        self.fetched.append(name)
        yield FILES[name]

    def interrupt(self, stop: bool) -> None:
        """Nothing waits."""


def cached(directory: Path, limit: int | None = None) -> tuple[CachedStorage, Source]:
    source: Any = Source()
    return CachedStorage(source, directory, KNOWN, limit), source


def left_by_a_kill(directory: Path, name: str) -> Path:
    """Write what a process that is killed while it fetches leaves: a partial copy and a lock file that nobody holds."""
    directory.mkdir(exist_ok=True)
    copy = f"{KNOWN[name][1][:16]}-{name}"
    (directory / f"{copy}.lock").touch()
    partial = directory / f"{copy}.0123abcd.partial"
    partial.write_bytes(FILES[name][:-1])
    return partial


def test_partial_copies_of_killed_processes_are_removed_at_the_start(tmp_path: Path) -> None:
    partials = [left_by_a_kill(tmp_path, name) for name in ("t0.tar", "t1.tar")]
    others = [tmp_path / "notes.0123abcd.partial", tmp_path / "0123456789abcdef-mine.txt.partial"]
    for other in others:
        other.write_bytes(b"x")
    with (tmp_path / f"{partials[1].name[:-17]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process writes this one
        cached(tmp_path)
        assert [path.exists() for path in [*partials, *others]] == [False, True, True, True]
    cached(tmp_path)
    assert [path.exists() for path in [*partials, *others]] == [False, False, True, True]
    assert not list(tmp_path.glob("*.lock"))


def test_partial_copies_do_not_use_up_the_limit(tmp_path: Path) -> None:
    storage, source = cached(tmp_path, limit=4 * SIZE)
    for name in ("t1.tar", "t2.tar", "t3.tar", "t4.tar"):
        left_by_a_kill(tmp_path, name)
    for _ in range(3):
        for name in ("t0.tar", "t1.tar", "t2.tar"):
            storage._present.clear()
            assert storage.whole(name) == FILES[name]
    assert source.fetched == ["t0.tar", "t1.tar", "t2.tar"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_partial_copy_that_another_process_writes_is_kept_and_counted(tmp_path: Path) -> None:
    storage, _ = cached(tmp_path, limit=3 * SIZE)
    partial = left_by_a_kill(tmp_path, "t5.tar")
    with (tmp_path / f"{partial.name[:-17]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in ("t0.tar", "t1.tar", "t2.tar"):
            storage.whole(name)
        assert partial.exists() and len(list(tmp_path.glob("*.tar"))) == 1


def test_a_lock_is_held_once_and_never_that_of_a_removed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock, removals = tmp_path / "x.lock", fcntl.flock, [1]

    def removed_before(file: Any, operation: int) -> None:
        """Lock a file that its holder has removed after it was opened."""
        if removals and removals.pop():
            path.unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    held = take_lock(path)
    assert held is not None and path.exists() and take_lock(path) is None
    held.close()
    assert take_lock(path) is not None


def test_copies_are_removed_with_their_locks_unless_one_is_held(tmp_path: Path) -> None:
    storage, _ = cached(tmp_path, limit=3 * SIZE)
    for name in ("t0.tar", "t1.tar"):
        storage.whole(name)
    first = tmp_path / f"{KNOWN['t0.tar'][1][:16]}-t0.tar.lock"
    with first.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        storage.whole("t2.tar")
        storage.whole("t3.tar")
        assert not first.with_suffix("").exists() and first.exists()
    assert not list(tmp_path.glob("*-t1.tar*"))
