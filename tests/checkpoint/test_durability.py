"""Checkpoints survive a crash of the machine, checked by the order of writes, syncs and renames.

A process saves checkpoints while all its file system operations are recorded. A crash may lose everything that was not
synced: the content of a file since its last fsync, and a name since the last fsync of its directory. A rename that was
not synced may also survive. So the content must be synced before a rename to a final name. The final name must be
synced before anything older is removed, and before the checkpoint is reported.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bst_base import files
from bst_base.files import atomic_directory, atomic_file, sync_directory
from bst_dist.checkpoint import durable
from bst_dist.checkpoint.directory import MANIFEST
from bst_dist.checkpoint.durable import Files
from bst_dist.checkpoint.fragments import MOMENTS, WEIGHT, Fragment
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.shards import Piece
from bst_dist.checkpoint.snapshot import CheckpointConfig, Identity, Position, Snapshots
from bst_dist.faults import ledger
from bst_dist.faults.ledger import Entry, Ledger
from bst_dist.parallel.mesh import Mesh
from bst_dist.report import metrics
from bst_dist.report.metrics import MetricsFile, StepReport
from tests.checkpoint.alone import Alone

Event = tuple[str, str, Any]


class Tensors:
    def owned(self) -> list[Fragment]:
        return [Fragment(Piece("a", (100,), 0, 100), {kind: torch.arange(100.0) for kind in (WEIGHT, *MOMENTS)})]

    def moments(self) -> dict[str, int]:
        return {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"a": (100,)}

    def updates(self) -> int:
        return 1


def snapshots(root: Path) -> Snapshots:
    identity = Identity("recipe", {}, 0, Layout(1, 1, 0), Rows(1, 1, Mesh(1, 0)))
    return Snapshots(root, Tensors(), Alone(), identity, CheckpointConfig(keep_last=1, weights_every=2))


def save(root: Path, tell: Callable[[], None]) -> None:
    run = snapshots(root)
    for step in (1, 2, 3, 3):  # the last one replaces a checkpoint of the same step
        run.start(Position(step, step, {}, []))
        run.finish()
        tell()


def write_file(root: Path, tell: Callable[[], None]) -> None:
    for content in (b"one", b"two"):
        with atomic_file(root / "file") as file:
            file.write(content)
        tell()


def write_directory(root: Path, tell: Callable[[], None]) -> None:
    with atomic_directory(root / "folder") as folder:
        (folder / "a").write_bytes(b"a")
    tell()


def report_and_save(root: Path, tell: Callable[[], None]) -> None:
    """Like `save`, after a line of metrics and an entry of the ledger for each step."""
    reports, book = MetricsFile(root, 0), Ledger(path=root / ledger.FILE)

    def report(step: int) -> None:
        reports.write(StepReport(step, step, *[0.0] * 8))
        book.add(Entry(step, 0, "a test", "skip"))

    report(1)
    save(root, lambda: (tell(), report(2)))


def recorded(work: Callable[..., None], root: Path) -> list[Event]:
    """Run `work` in a process; return its file system operations below `root`, in order."""
    log = root.parent / f"{root.name}.events"
    if (pid := os.fork()) == 0:
        try:
            events: list[Event] = []
            _record(events, str(root))
            work(root, lambda: events.append(("told", "", None)))
            os.write(os.open(log, os.O_CREAT | os.O_WRONLY), json.dumps(events).encode())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.__stderr__)
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    return [tuple(event) for event in json.loads(log.read_text())]


def _record(events: list[Event], root: str) -> None:
    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        path = str(args[0])
        if not path.startswith(root) or (event == "open" and not args[2] & os.O_CREAT):
            return
        if event in ("open", "os.mkdir"):
            events.append(("create", path, None))
        elif event == "os.rename":
            events.append(("rename", path, [str(args[1]), _sizes(Path(path))]))
        else:
            events.append(("remove", path, None))

    def fsync(descriptor: int, original: Callable[[int], None] = os.fsync) -> None:
        original(descriptor)
        if (path := str(opened(descriptor))).startswith(root):
            events.append(("fsync", path, os.fstat(descriptor).st_size))

    os.fsync = fsync
    sys.addaudithook(audit)


def opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _sizes(path: Path) -> dict[str, int]:
    """Return the bytes of a file, or of each file of a directory."""
    return {str(file): file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])}


def counts(path: str) -> bool:
    """Whether readers treat a file or directory of this name as complete."""
    return not path.endswith((".partial", ".replaced", ".deleted", "checkpoints")) and ".partial/" not in path


def violations(events: list[Event]) -> list[str]:
    """Return what a crash at some moment would have broken."""
    synced: dict[str, int] = {}
    unsafe: set[str] = set()  # names that a crash may lose
    found = []
    for kind, path, more in events:
        if kind == "create":
            synced.pop(path, None)
            unsafe.add(path)
        elif kind == "fsync":
            synced[path] = more
            unsafe -= {name for name in unsafe if str(Path(name).parent) == path}
        elif kind == "rename" and counts(target := more[0]):
            sizes = more[1]
            found += [f"{target}: {name} is not synced" for name, size in sizes.items() if synced.get(name) != size]
            found += [f"{target}: the name of {name} is not synced" for name in sizes if name in unsafe - {path}]
            unsafe = unsafe - {path} | {target}
        if kind == "told" or (kind in ("remove", "rename") and path.endswith((".replaced", ".deleted"))):
            found += [f"{name}: may be gone after a crash" for name in unsafe if counts(name)]
    return found


WORKS = {"checkpoints": save, "a file": write_file, "a directory": write_directory}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_no_data_is_lost_in_a_crash_and_every_fsync_is_needed(tmp_path, work):
    (tmp_path / "root").mkdir()
    events = recorded(work, tmp_path / "root")
    assert violations(events) == []
    syncs = [place for place, (kind, *_) in enumerate(events) if kind == "fsync"]
    assert len(syncs) >= 3
    for place in syncs:
        assert violations(events[:place] + events[place + 1 :]), f"nothing needs the sync of {events[place][1]}"


def test_metrics_and_ledger_are_not_behind_a_checkpoint_after_a_crash(tmp_path):
    """The guard decides from them, so a run that resumes with fewer lines may decide otherwise."""
    (tmp_path / "root").mkdir()
    events = recorded(report_and_save, tmp_path / "root")
    commits = [
        place
        for place, (kind, _, more) in enumerate(events)
        if kind == "rename" and counts(more[0]) and Path(more[0]).name.startswith("step-")
    ]
    assert len(commits) == 4
    for name in (metrics.FILE, ledger.FILE):
        path = str(tmp_path / "root" / name)
        ends = [0]
        for line in Path(path).read_bytes().splitlines(keepends=True):
            ends.append(ends[-1] + len(line))
        # After each of the four commits one more line was written to both files.
        for written, place in enumerate(commits, 1):
            synced = [more for kind, other, more in events[:place] if (kind, other) == ("fsync", path)]
            assert max(synced, default=0) >= ends[written], name
    created = [place for place, (kind, path, _) in enumerate(events) if kind == "create" and path.endswith(ledger.FILE)]
    assert ("fsync", str(tmp_path / "root")) in [event[:2] for event in events[created[0] : commits[0]]]


def test_a_checkpoint_whose_metrics_cannot_be_synced_fails(tmp_path, monkeypatch):
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if opened(descriptor).name == metrics.FILE:
            raise OSError(errno.EIO, "Input/output error")
        original(descriptor)

    MetricsFile(tmp_path, 0).write(StepReport(1, 1, *[0.0] * 8))
    monkeypatch.setattr(os, "fsync", fsync)
    run = snapshots(tmp_path)
    run.start(Position(1, 1, {}, []))
    assert re.search(rf"cannot write {tmp_path}/metrics.jsonl: Input/output error", run.finish().why)


def test_a_file_is_recorded_with_its_size_and_digest(tmp_path):
    written = Files(tmp_path)
    with written.open("a") as file:
        assert file.write(b"front ") == 6
        assert file.write(torch.arange(3, dtype=torch.int16).numpy()) == 6
    content = (tmp_path / "a").read_bytes()
    assert content == b"front \0\0\1\0\2\0"
    assert written.records == {"a": {"bytes": 12, "sha256": hashlib.sha256(content).hexdigest()}}


def test_a_long_write_is_synced_and_counted_in_parts(tmp_path, monkeypatch):
    """A sync of everything at the end could take longer than the watchdog waits for a sign of progress."""
    monkeypatch.setattr(durable, "PART", 4)
    synced: list[tuple[int, int]] = []
    written = Files(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_size, written.bytes)))
    with written.open("a") as file:
        for content in (b"012", b"345", b"6789abcdef"):
            assert file.write(content) == len(content)
    assert synced == [(6, 6), (10, 10), (14, 14), (16, 16)]
    assert (tmp_path / "a").read_bytes() == b"0123456789abcdef"
    assert written.records["a"] == {"bytes": 16, "sha256": hashlib.sha256(b"0123456789abcdef").hexdigest()}
    with written.open("b") as file:
        file.write(b"xy")
    assert written.bytes == 18


def test_every_kind_of_file_of_a_checkpoint_is_synced(tmp_path):
    (tmp_path / "root").mkdir()
    events = recorded(save, tmp_path / "root")
    synced = {Path(path).name for kind, path, _ in events if kind == "fsync"}
    for name in ("weights-00000.safetensors", "optimizer-00000.safetensors", "rank-00000.pt", MANIFEST, "checkpoints"):
        assert name in synced
    assert any(name.endswith(".partial") for name in synced)


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.ENOTSUP])
def test_a_mount_without_directory_fsync_is_reported_once(tmp_path, monkeypatch, caplog, refusal):
    def fsync(descriptor: int) -> None:
        if opened(descriptor).is_dir():
            raise OSError(refusal, os.strerror(refusal))

    files._refusing.clear()
    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(2):
        with atomic_file(tmp_path / "file") as file:
            file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert caplog.text.count("this mount does not sync directories") == 1


def test_other_errors_of_a_directory_fsync_are_raised(tmp_path, monkeypatch):
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        sync_directory(tmp_path)
