"""Checkpoints written in the background, killed at any moment, or without disk space; one rank, no model."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bst_base.errors import StorageError
from bst_dist.checkpoint import durable, host_copy, retention, saving
from bst_dist.checkpoint.callbacks import Checkpoints, Evaluated
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import (
    MANIFEST,
    PINNED,
    REPLACED,
    CheckpointError,
    committed,
    damage,
    directory,
    find,
    newest_valid,
    read_manifest,
    step_of,
)
from bst_dist.checkpoint.fragments import MOMENTS, WEIGHT, Fragment
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.retention import has_full
from bst_dist.checkpoint.saving import Failed, Saved, Saver
from bst_dist.checkpoint.shards import Piece
from bst_dist.checkpoint.snapshot import Identity, Position, Snapshots
from bst_dist.parallel.mesh import Mesh
from bst_dist.report.metrics import EvalReport
from tests.checkpoint.alone import Alone


class Tensors:
    """A state of a few tensors whose values are a function of the step."""

    def __init__(self, numel: int = 100) -> None:
        self.step = 0
        self.values = {name: {kind: torch.zeros(numel) for kind in (WEIGHT, *MOMENTS)} for name in ("a", "b")}

    def take_step(self, step: int) -> None:
        self.step = step
        for values in self.values.values():
            for kind, tensor in values.items():
                tensor.copy_(content(step, kind, tensor.numel()))

    def is_right(self) -> bool:
        return all(
            torch.equal(tensor, content(self.step, kind, tensor.numel()))
            for values in self.values.values()
            for kind, tensor in values.items()
        )

    def held(self) -> list[Fragment]:
        return [
            Fragment(Piece(name, (values[WEIGHT].numel(),), 0, values[WEIGHT].numel()), values)
            for name, values in self.values.items()
        ]

    owned = held

    def moments(self) -> dict[str, int]:
        return {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: (values[WEIGHT].numel(),) for name, values in self.values.items()}

    def updates(self) -> int:
        return self.step

    def filled(self, step: int, updates: int) -> None:
        assert step == updates
        self.step = step


def content(step: int, kind: str, numel: int) -> Tensor:
    generator = torch.Generator().manual_seed(step * 10 + len(kind))
    return torch.randn(numel, generator=generator)


def snapshots(run_dir: Path, state: Tensors, **settings: Any) -> Snapshots:
    identity = Identity("recipe", {}, 0, Layout(1, 1, 0), Rows(1, 1, Mesh(1, 0)))
    return Snapshots(run_dir, state, Alone(), identity, CheckpointConfig(**settings))


def position(step: int) -> Position:
    return Position(step, 10 * step, {"step": step}, [], skipped=step % 3)


def save(run: Snapshots, state: Tensors, step: int, **given: Any) -> Saved | Failed:
    state.take_step(step)
    failed = run.start(position(step), **given)
    state.take_step(step + 1)  # training continues at once
    return failed or run.finish()


def resume(run_dir: Path, numel: int = 100, **settings: Any) -> int:
    """Load the newest checkpoint and check that all values are of its step; return the step, 0 if there is none."""
    state = Tensors(numel)
    run = snapshots(run_dir, state, **settings)
    checkpoint, _ = run.newest()
    if checkpoint is None:
        return 0
    assert run.load(checkpoint) == position(step_of(checkpoint))
    assert state.step == step_of(checkpoint)
    assert state.is_right()
    return state.step


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_holds_the_state_at_the_time_of_the_request(tmp_path, background):
    state = Tensors()
    run = snapshots(tmp_path, state, background=background)
    for step in (3, 5):
        saved = save(run, state, step, validation_loss=step / 2)
        assert saved.path == directory(tmp_path, step)
        assert saved.bytes == sum(path.stat().st_size for path in saved.path.iterdir() if path.name != MANIFEST)
        assert read_manifest(saved.path)["validation_loss_nats"] == step / 2
        assert not damage(saved.path)
    assert resume(tmp_path) == 5


class OnDevice(Tensor):
    """Tensor that behaves like one on an accelerator: NumPy can read it only after a copy to the host."""

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *_: Any) -> Tensor:
        return self.as_subclass(Tensor)


def test_device_tensors_are_written_without_a_background_copy(tmp_path):
    state = Tensors()
    for values in state.values.values():
        values |= {kind: tensor.as_subclass(OnDevice) for kind, tensor in values.items()}
    saved = save(snapshots(tmp_path, state, background=False), state, 3)
    assert isinstance(saved, Saved), saved
    assert resume(tmp_path) == 3


def test_a_checkpoint_is_committed_only_after_all_files_are_written(tmp_path, monkeypatch):
    state, held_up = Tensors(), []
    run = snapshots(tmp_path, state)
    original = saving.write

    def wait(*args: Any) -> None:
        while not held_up:
            pass
        original(*args)

    monkeypatch.setattr(saving, "write", wait)
    assert run.start(position(1)) is None
    assert run.poll() is None
    assert committed(tmp_path) == []
    held_up.append(True)
    assert run.finish().path == directory(tmp_path, 1)
    assert run.poll() is None


def test_training_does_not_wait_for_the_commit(tmp_path, monkeypatch):
    state, go_on = Tensors(), threading.Event()
    run = snapshots(tmp_path, state)
    original = saving._commit

    def wait(*args: Any) -> None:
        go_on.wait()
        original(*args)

    monkeypatch.setattr(saving, "_commit", wait)
    assert run.start(position(1)) is None
    futures.wait([run._saver._pending.written])
    assert run.poll() is None  # everything is written; the commit begins
    assert run.poll() is None
    assert committed(tmp_path) == []
    go_on.set()
    assert run.finish().path == directory(tmp_path, 1)


def test_old_checkpoints_are_removed_before_the_run_ends(tmp_path, monkeypatch):
    state, original = Tensors(), retention.remove_leftovers
    run = snapshots(tmp_path, state, keep_last=1)

    def slowly(*args: Any) -> None:
        time.sleep(0.2)
        original(*args)

    monkeypatch.setattr(retention, "remove_leftovers", slowly)
    for step in (1, 2):
        save(run, state, step)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_failed_removal_of_an_old_checkpoint_is_logged(tmp_path, monkeypatch, caplog):
    def refuse(path: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(retention.shutil, "rmtree", refuse)
    state = Tensors()
    run = snapshots(tmp_path, state, keep_last=1)
    assert [save(run, state, step).path for step in (1, 2)] == [directory(tmp_path, step) for step in (1, 2)]
    assert "step-00000001.deleted: could not be removed: Permission denied" in caplog.text


def test_a_weights_only_checkpoint_is_a_third_as_large_and_not_resumed(tmp_path):
    state = Tensors(numel=100_000)
    run = snapshots(tmp_path, state, weights_every=1)
    full = save(run, state, 1)
    thin = save(run, state, 2, full=False)
    assert 2.9 < full.bytes / thin.bytes < 3.1
    assert newest_valid(tmp_path) == thin.path
    assert resume(tmp_path, 100_000) == 1
    with pytest.raises(CheckpointError, match="holds only weights"):
        run.load(thin.path)


def test_a_full_checkpoint_replaces_weights_only_of_the_same_step(tmp_path):
    state = Tensors()
    run = snapshots(tmp_path, state, weights_every=1)
    save(run, state, 1, full=False)
    save(run, state, 1)
    assert resume(tmp_path) == 1


def test_a_checkpoint_that_replaces_a_pinned_one_is_pinned(tmp_path):
    state = Tensors()
    run = snapshots(tmp_path, state, weights_every=1, keep_last=1)
    (save(run, state, 1, full=False).path / PINNED).touch()
    for step in (1, 2, 3):
        save(run, state, step)
    run.finish()
    assert {step_of(path): (path / PINNED).exists() for path in committed(tmp_path)} == {3: False, 2: False, 1: True}
    assert read_manifest(directory(tmp_path, 1))["files"].keys() > {"optimizer-00000.safetensors"}


def test_a_stuck_leftover_prevents_neither_the_start_nor_a_checkpoint(tmp_path, monkeypatch, caplog):
    stuck, original = tmp_path / "checkpoints" / "step-00000007.3.partial", shutil.rmtree

    def refuse(path: Path, *args: Any, **options: Any) -> None:
        if path == stuck:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        original(path, *args, **options)

    stuck.mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    state = Tensors()
    run = snapshots(tmp_path, state)
    run.rehearse()
    assert isinstance(save(run, state, 1), Saved)
    assert f"{stuck}: could not be removed: Device or resource busy" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(snapshots(tmp_path, Tensors()), Tensors(), 1)
    with pytest.raises(CheckpointError, match=r"a has \(100,\) values, here \(50,\)"):
        snapshots(tmp_path, Tensors(numel=50)).load(directory(tmp_path, 1))


def test_a_checkpoint_with_a_changed_digit_in_its_manifest_is_not_resumed(tmp_path):
    state = Tensors()
    run = snapshots(tmp_path, state, weights_every=2, keep_last=3)
    for step in (1, 2, 3):
        save(run, state, step)
    thinned = directory(tmp_path, 2)
    retention.keep_only_weights(retention.CheckpointEntry(thinned, read_manifest(thinned)))
    assert damage(thinned) == []
    path = directory(tmp_path, 3) / MANIFEST
    path.write_text(path.read_text().replace('"tokens": 30', '"tokens": 10'))
    assert damage(path.parent) == ["damaged (checksum mismatch): manifest.json"]
    assert resume(tmp_path) == 1
    assert (tmp_path / "checkpoints" / "step-00000003.damaged").exists()


def test_newest_waits_for_a_pending_save(tmp_path):
    state = Tensors()
    run = snapshots(tmp_path, state)
    assert run.start(position(1)) is None
    assert run.newest() == (directory(tmp_path, 1), [])


# Killed before each change to the disk, and in the middle of each write


EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def die_at(count: int, root: Path) -> None:
    """Make this process exit, without cleanup, at its `count`-th change to files below `root`."""
    done = [0]

    def change() -> bool:
        done[0] += 1
        return done[0] == count

    def audit(event: str, args: tuple[Any, ...]) -> None:
        reads = event == "open" and args[1] in ("r", "rb")
        if event in EVENTS and not reads and str(root) in str(args[0]) and change():
            os._exit(9)

    def write(self: Any, data: Any, original: Callable[..., int] = durable.Hashing.write) -> int:
        if change():
            original(self, memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
            self.flush()
            os._exit(9)
        return original(self, data)

    def fsync(descriptor: int, original: Callable[[int], None] = os.fsync) -> None:
        if change():
            os._exit(9)
        original(descriptor)

    sys.addaudithook(audit)
    durable.Hashing.write, os.fsync = write, fsync


def go_on(run_dir: Path, count: int, said: int) -> None:
    """In a separate process: resume, save two steps with retention, report each; exit at the `count`-th change."""
    settings = {"keep_last": 1, "weights_every": 3}
    done = resume(run_dir, **settings)
    die_at(count, run_dir)
    state = Tensors()
    run = snapshots(run_dir, state, **settings)
    for step in (done + 1, done + 2):
        assert save(run, state, step).path == directory(run_dir, step)
        os.write(said, step.to_bytes(4, "little"))
    run._saver._thread.shutdown()


@pytest.mark.long
def test_a_kill_at_any_disk_change_is_resumed_correctly(tmp_path):
    count, survived, told = 0, 0, 0
    while survived < 2:  # two runs in which `count` exceeds the number of changes
        count += 1
        receiver, sender = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                go_on(tmp_path, count, sender)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.__stderr__)
                os._exit(1)
        os.close(sender)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        steps = os.read(receiver, 100)
        os.close(receiver)
        assert status in (0, 9)
        told = max([told, *(int.from_bytes(steps[i : i + 4], "little") for i in range(0, len(steps), 4))])
        done = resume(tmp_path, keep_last=1, weights_every=3)
        assert done in (told, told + 1)  # told + 1: killed between commit and report
        assert not list((tmp_path / "checkpoints").glob("*.damaged"))
        survived += status == 0
        told = done
    assert count > 50


def dies(work: Callable[[], None], count: int, root: Path) -> bool:
    """Run `work` in a process that exits at its `count`-th change to files below `root`; return whether it did."""
    if (pid := os.fork()) == 0:
        try:
            die_at(count, root)
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.__stderr__)
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("full", [True, False], ids=["full", "weights only"])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_its_step(tmp_path, full):
    """The older checkpoint of the step, full or of only the weights, is there until the newer one has its name."""
    settings = {"keep_last": 1, "weights_every": 1}
    names, older_counts = set(), 0
    for count in itertools.count(1):
        root = tmp_path / str(count)
        state = Tensors()
        save(snapshots(root, state, **settings), state, 1, full=full)
        killed = dies(lambda root=root, state=state: save(snapshots(root, state, **settings), state, 1), count, root)
        names |= {path.name for path in (root / "checkpoints").iterdir()}
        found = newest_valid(root)
        older_counts += found.name.endswith(REPLACED)
        assert step_of(found) == 1
        assert find(root, 1) == found
        assert resume(root, **settings) == has_full(root)
        assert has_full(root) or not full
        run = snapshots(root, state, **settings)
        run.rehearse()  # the next start: everything has its name again
        assert [path.name for path in committed(root)] == ["step-00000001"]
        save(run, state, 2)
        assert [path.name for path in (root / "checkpoints").iterdir() if REPLACED in path.name] == []
        if not killed:
            break
    assert count > 20
    assert {"step-00000001.replaced", "step-00000001.0.partial"} <= names
    assert older_counts == 1  # killed between the two renames


def test_a_replaced_checkpoint_does_not_count_beside_the_newer_one(tmp_path):
    state = Tensors()
    run = snapshots(tmp_path, state, keep_last=1)
    save(run, state, 1)
    shutil.copytree(directory(tmp_path, 1), tmp_path / "checkpoints" / "step-00000001.replaced")
    assert committed(tmp_path) == [directory(tmp_path, 1)]
    assert retention.superseded(tmp_path) == [tmp_path / "checkpoints" / "step-00000001.replaced"]
    retention.replace(directory(tmp_path, 1), shutil.copytree(directory(tmp_path, 1), tmp_path / "newer"))
    assert committed(tmp_path) == [directory(tmp_path, 1)]
    retention.abandon(tmp_path, 0)
    assert committed(tmp_path) == []
    retention.remove_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


# No disk space


def test_too_little_disk_space_is_reported_before_writing(tmp_path, monkeypatch):
    state = Tensors()
    run = snapshots(tmp_path, state)
    save(run, state, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    failed = run.start(position(2))
    assert re.search(r"it needs 1\.\d MB, .* has 1\.0 kB free, 1\.\d MB too little", failed.why)
    assert "free more space" in failed.why
    assert run.finish() is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes."""
    if os.getuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine does not let root mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.ranks
def test_a_disk_that_fills_up_while_saving_leaves_the_previous_checkpoint(small_disk, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))  # passes the check
    state = Tensors(numel=50_000)  # 1.2 MB
    run = snapshots(small_disk, state)
    assert isinstance(save(run, state, 1), Saved)
    failed = save(run, state, 2)
    assert "No space left on device" in failed.why
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000001"]
    assert resume(small_disk, 50_000) == 1
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert isinstance(save(run, state, 2), Saved)
    assert resume(small_disk, 50_000) == 2


@pytest.fixture
def full_disk(monkeypatch):
    """Make every write fail."""

    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device", "there")

    monkeypatch.setattr(saving, "write", write)


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "rank-00000.pt", MANIFEST, "1.0.partial", "checkpoints"])
def test_errors_of_writes_and_syncs_name_the_file(tmp_path, monkeypatch, name):
    """The system does not name it in errors about an open file."""
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    failed = save(snapshots(tmp_path, Tensors()), Tensors(), 1)
    message = rf"(rank 0: )?\S+ cannot write {tmp_path}/\S*{name}: No space left on device"
    assert re.fullmatch(message, failed.why), failed.why


def test_an_error_of_the_first_test_write_names_the_file(tmp_path, monkeypatch):
    def fsync(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match=rf"cannot write {tmp_path}/checkpoints/step-rehearsal\S+/0: Disk quota"):
        snapshots(tmp_path, Tensors()).rehearse()


def after_steps(run_dir: Path, until: int, said: list[str], **settings: Any) -> None:
    trainer = SimpleNamespace(tokens=0, carried=[], skipped=0)
    run = snapshots(run_dir, Tensors(), **settings)
    callback = Checkpoints(run.config, run, trainer, Evaluated(), lambda step: {"step": step}, said.append)
    for step in range(1, until + 1):
        callback.after_step(SimpleNamespace(step=step), last=step == until)


def test_a_failed_checkpoint_ends_the_run_only_at_the_last_step(tmp_path, full_disk):
    said: list[str] = []
    with pytest.raises(StorageError, match=r"no checkpoint of step 5: rank 0: .* cannot write there: No space"):
        after_steps(tmp_path, 5, said, every=2)
    assert [re.sub(r"rank 0: \S+ cannot", "rank 0: HOST cannot", line.splitlines()[0]) for line in said] == [
        f"no checkpoint of step {step}: rank 0: HOST cannot write there: No space left on device" for step in (2, 4)
    ]
    assert "the run continues" in said[0]


def test_a_run_stops_after_consecutive_checkpoint_failures(tmp_path, full_disk):
    said: list[str] = []
    with pytest.raises(StorageError, match=r"(?s)no checkpoint of step 4: .*2 in a row \(checkpoint.failures\)"):
        after_steps(tmp_path, 9, said, every=2, failures=2)
    assert len(said) == 1


def test_a_failed_checkpoint_before_a_roll_back_is_printed_and_counted(tmp_path, full_disk):
    """The run looks for a checkpoint to continue from while another is being written."""
    run, state = snapshots(tmp_path, Tensors()), Tensors()
    said = run.ranks.said
    for count in (1, 2):
        state.take_step(count)
        assert run.start(position(count)) is None
        assert run.newest() == (None, [])
        assert said[-1].startswith(f"no checkpoint of step {count}: rank 0: ")
        assert (len(said), run.failed) == (count, count)


def test_a_written_checkpoint_resets_the_failure_count(tmp_path, monkeypatch):
    original, done = saving.write, []

    def write(*args: Any) -> None:
        done.append(None)
        if len(done) in (1, 4, 7):  # the first of the two files of the checkpoints of steps 2, 6 and 10
            raise OSError(errno.EIO, "Input/output error", "there")
        original(*args)

    monkeypatch.setattr(saving, "write", write)
    said: list[str] = []
    after_steps(tmp_path, 12, said, every=2, failures=2, background=False)
    assert [line.split(":")[0] for line in said if "no checkpoint" in line] == [
        f"no checkpoint of step {step}" for step in (2, 6, 10)
    ]


def test_copy_blocks_are_little_larger_than_the_copied_data():
    for count in (1, 1 << 18, 7_000_000, 3 * (1 << 28) + 5, 21_000_000_000):
        sizes = host_copy.block_sizes(count)
        assert count <= sum(sizes) < count + (1 << 18)
        assert all(size & (size - 1) == 0 and size <= 1 << 28 for size in sizes)
    assert host_copy.block_sizes(-3) == []


def test_a_copy_in_several_blocks_is_written_correctly(tmp_path, monkeypatch):
    monkeypatch.setattr(host_copy, "block_sizes", lambda count: [64] * -(-count // 64))
    state = Tensors(numel=150)
    assert isinstance(save(snapshots(tmp_path, state), state, 1), Saved)
    assert resume(tmp_path, 150) == 1


def test_a_rank_that_cannot_write_is_found_before_the_first_step(tmp_path, monkeypatch):
    run = snapshots(tmp_path, Tensors())
    run.rehearse()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path)[:-1])
    with pytest.raises(StorageError, match=r"rank 0: .* reads other bytes from"):
        run.rehearse()


def test_a_rank_creates_the_directory_that_it_does_not_see_yet(tmp_path, monkeypatch):
    """Rank 0 has created it on another host; over NFS this host may remember that it did not exist."""
    monkeypatch.setattr(Saver, "_prepare", lambda *_: None)
    snapshots(tmp_path, Tensors()).rehearse()


def test_a_disk_without_room_for_one_checkpoint_is_found_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"it needs 1\.\d MB, .* has 1\.0 kB free"):
        snapshots(tmp_path, Tensors()).rehearse()


def test_checkpoints_are_written_at_the_configured_steps(tmp_path):
    after_steps(tmp_path, 7, [], every=3, at=(2,), weights_every=5, keep_last=9)
    full = {step_of(path): (path / "optimizer-00000.safetensors").exists() for path in committed(tmp_path)}
    assert full == {7: True, 6: True, 5: False, 3: True, 2: True}


def test_resuming_under_the_same_layout_opens_few_files(tmp_path, monkeypatch):
    """The checkpoint is of 64 ranks and has no index; this rank wrote the first files."""
    state = Tensors()
    run = snapshots(tmp_path, state)
    save(run, state, 1)
    path = directory(tmp_path, 1)
    manifest = read_manifest(path)
    del manifest["index"]
    for rank in range(1, 64):
        for name in list(manifest["files"]):
            if name.split(".")[0].endswith("00000"):
                manifest["files"][name.replace("00000", f"{rank:05d}")] = manifest["files"][name]
    (path / MANIFEST).write_text(json.dumps(manifest))
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and counting else None)
    counting = True
    assert run.load(path).step == 1  # the other ranks' files do not exist
    counting = False
    assert len([name for name in opened if str(path) in name]) <= 8


def test_best_checkpoint_is_not_chosen_by_the_loss_of_the_averaged_weights():
    evaluated = Evaluated()
    for step, loss in ((1, 2.0), (2, 3.0)):
        report = EvalReport(step, "validation", 9, loss, 3.0, [1.0], 0.5)
        evaluated.write(report)
        evaluated.write(replace(report, loss_nats=loss - 1).of_average())
        assert evaluated.loss(step) == loss
