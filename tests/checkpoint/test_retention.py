from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from bst_base.errors import StorageError
from bst_dist.checkpoint import retention
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import FORMAT, MANIFEST, PINNED, committed, directory, step_of
from bst_dist.checkpoint.retention import CheckpointEntry, leftovers, readable, reasons, remove_leftovers, retain


def hold(run_dir: Path, step: int, loss: float | None = None, full: bool = True) -> Path:
    path = directory(run_dir, step)
    path.mkdir(parents=True)
    names = ["weights-00000.safetensors", *(["optimizer-00000.safetensors", "rank-00000.pt"] if full else [])]
    for name in names:
        (path / name).write_bytes(b"x")
    manifest = {"format": FORMAT, "validation_loss_nats": loss, "files": {name: {"bytes": 1} for name in names}}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in committed(run_dir)]


def held(run_dir: Path, step: int) -> CheckpointEntry:
    return next(one for one in readable(run_dir) if one.step == step)


@pytest.mark.parametrize(
    ("settings", "stay"),
    [
        ({}, [80, 70, 30]),  # the two newest and the best
        ({"keep_best": 0, "keep_last": 1}, [80]),
        ({"keep_best": 2}, [80, 70, 40, 30]),
        ({"keep_best": 0, "keep_every": 20}, [80, 70, 60, 40, 20]),
        ({"keep_best": 0, "at": (10,)}, [80, 70, 10]),
    ],
    ids=["default", "one", "best", "every", "at"],
)
def test_retention_settings_decide_which_checkpoints_stay(tmp_path, settings, stay):
    losses = {20: 3.0, 30: 1.0, 40: 2.0, 60: 2.5}
    for step in range(10, 90, 10):
        hold(tmp_path, step, losses.get(step))
    retain(tmp_path, CheckpointConfig(**settings))
    assert steps(tmp_path) == stay
    remove_leftovers(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(stay)


def test_a_pinned_checkpoint_stays(tmp_path):
    for step in (10, 20, 30):
        path = hold(tmp_path, step)
        if step == 10:
            (path / PINNED).touch()
    retain(tmp_path, CheckpointConfig(keep_last=1))
    assert steps(tmp_path) == [30, 10]


def test_a_weights_only_checkpoint_does_not_count_as_newest(tmp_path):
    for step in (10, 20):
        hold(tmp_path, step)
    hold(tmp_path, 30, full=False)
    retain(tmp_path, CheckpointConfig(keep_last=2, weights_every=30))
    assert steps(tmp_path) == [30, 20, 10]


def test_an_old_full_checkpoint_at_a_weights_step_keeps_only_weights(tmp_path):
    for step in (10, 20, 30):
        hold(tmp_path, step)
    retain(tmp_path, CheckpointConfig(keep_last=1, weights_every=10))
    assert [one.full for one in readable(tmp_path)] == [True, False, False]
    assert {path.name for path in directory(tmp_path, 10).iterdir()} == {MANIFEST, "weights-00000.safetensors"}


def test_interrupted_removal_of_optimizer_files_is_completed(tmp_path):
    for step in (10, 20):
        hold(tmp_path, step)
    (directory(tmp_path, 10) / MANIFEST).write_text(
        json.dumps({"format": FORMAT, "files": {"weights-00000.safetensors": {"bytes": 1}}})
    )
    retain(tmp_path, CheckpointConfig(keep_last=1, weights_every=10))
    assert {path.name for path in directory(tmp_path, 10).iterdir()} == {MANIFEST, "weights-00000.safetensors"}


def test_an_unreadable_checkpoint_is_neither_counted_nor_removed(tmp_path):
    for step in (10, 20, 30):
        hold(tmp_path, step)
    (directory(tmp_path, 30) / MANIFEST).write_text("{")
    retain(tmp_path, CheckpointConfig(keep_last=1))
    assert steps(tmp_path) == [30, 20]


def test_reasons_for_keeping_are_reported(tmp_path):
    hold(tmp_path, 10, loss=1.0)
    hold(tmp_path, 20, loss=2.0)
    config = CheckpointConfig(every=10, keep_last=1, keep_every=20, at=(10,))
    assert reasons(readable(tmp_path), config) == {20: ["newest", "every"], 10: ["best", "at"]}


@pytest.mark.parametrize(
    ("constant_until", "kept"),
    [(None, [60, 50]), (60, [60, 50]), (59, [60, 50]), (40, [60, 50, 40]), (39, [60, 50, 30]), (9, [60, 50])],
)
def test_the_last_checkpoint_before_the_decay_is_kept(tmp_path, constant_until, kept):
    for step in range(10, 70, 10):
        hold(tmp_path, step, full=step != 20)
    retain(tmp_path, CheckpointConfig(), constant_until)
    assert [step for step in steps(tmp_path) if step != 20] == kept
    if len(kept) == 3:
        found = reasons(readable(tmp_path), CheckpointConfig(), constant_until)
        assert found[kept[2]] == ["before decay"]


def test_the_roll_back_target_of_the_guard_counts_as_newest(tmp_path):
    """The guard rolls back only to scheduled checkpoints; a checkpoint after a signal may be newer."""
    hold(tmp_path, 20, loss=2.0)
    hold(tmp_path, 25, loss=2.0)
    kept = reasons(readable(tmp_path), CheckpointConfig(every=20, keep_last=1, keep_best=0))
    assert kept == {25: ["newest"], 20: ["newest"]}


def test_storage_errors_in_retention_are_only_logged(tmp_path, monkeypatch, caplog):
    def retain(*_) -> None:
        raise StorageError("node-02 cannot read manifest.json: Input/output error")

    monkeypatch.setattr(retention, "retain", retain)
    retention.tidy(tmp_path, CheckpointConfig())
    assert caplog.messages == [
        "old checkpoints could not be looked at: node-02 cannot read manifest.json: Input/output error"
    ]


def test_checkpoints_of_repeated_steps_are_marked_as_deleted(tmp_path):
    for step in (10, 20, 30):
        hold(tmp_path, step)
    retention.abandon(tmp_path, 20)
    assert steps(tmp_path) == [20, 10]
    assert [path.name for path in leftovers(tmp_path)] == ["step-00000030.deleted"]


def test_damaged_checkpoints_of_one_step_get_different_names(tmp_path):
    for _ in range(3):
        retention.set_aside(hold(tmp_path, 10))
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["step-00000010.2.damaged", "step-00000010.3.damaged", "step-00000010.damaged"]


def test_leftovers_are_found_and_removed(tmp_path):
    hold(tmp_path, 10)
    for name in ("step-00000020.partial", "step-00000005.deleted"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [path.name for path in leftovers(tmp_path)] == ["step-00000005.deleted", "step-00000020.partial"]
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


@pytest.fixture
def stuck(monkeypatch):
    """Return a function after which directories of the given names cannot be removed."""
    names: set[str] = set()
    original = shutil.rmtree

    def rmtree(path: Path, *args: object, **options: object) -> None:
        if path.name in names:
            raise OSError(errno.EBUSY, "Device or resource busy")  # without a file name, as from some calls
        original(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return lambda *given: names.update(given)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_leftover_that_cannot_be_removed_does_not_keep_the_others(tmp_path, stuck, caplog):
    for name in ("step-00000001.deleted", "step-00000002.deleted", "step-00000003.7.partial", "step-00000004.deleted"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    stuck("step-00000001.deleted", "step-00000003.7.partial")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000001.deleted", "step-00000003.7.partial"]
    assert [message.removeprefix(f"{tmp_path}/checkpoints/") for message in caplog.messages] == [
        f"{name}: could not be removed: Device or resource busy; tried again at the next checkpoint"
        for name in names(tmp_path)
    ]


def test_of_a_linked_checkpoint_only_the_link_is_removed(tmp_path, caplog):
    archive = hold(tmp_path / "archive", 5)
    for step in (10, 20):
        hold(tmp_path, step)
    directory(tmp_path, 5).symlink_to(archive)
    retention.tidy(tmp_path, CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["step-00000020"]
    assert len(list(archive.iterdir())) == 4
    assert caplog.messages == []


def test_nothing_is_removed_from_the_archive_of_a_linked_checkpoint(tmp_path, caplog):
    archive = hold(tmp_path / "archive", 10)
    for step in (20, 30):
        hold(tmp_path, step)
    directory(tmp_path, 10).symlink_to(archive)
    before = {path.name: path.read_bytes() for path in archive.iterdir()}
    retention.tidy(tmp_path, CheckpointConfig(keep_last=1, weights_every=10, every=50))
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]
    assert not held(tmp_path, 20).full and held(tmp_path, 10).full
    assert {path.name: path.read_bytes() for path in archive.iterdir()} == before
    assert caplog.messages == []


def test_a_checkpoint_that_cannot_be_renamed_does_not_keep_the_others(tmp_path, monkeypatch, caplog):
    for step in (10, 20, 30, 40):
        hold(tmp_path, step)
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "step-00000020":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    retention.tidy(tmp_path, CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["step-00000020", "step-00000040"]
    assert "step-00000020: could not be removed: Permission denied" in caplog.text


def test_a_full_disk_does_not_prevent_removals(tmp_path, monkeypatch, caplog):
    """To keep only the weights of a checkpoint, its manifest is written anew."""
    for step in (10, 20, 30):
        hold(tmp_path, step)

    def full(_: CheckpointEntry) -> None:
        raise StorageError("manifest.json: the disk is full")

    monkeypatch.setattr(retention, "keep_only_weights", full)
    retention.tidy(tmp_path, CheckpointConfig(keep_last=1, weights_every=20))
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert "step-00000020: could not be removed: manifest.json: the disk is full" in caplog.text


def test_a_step_is_deleted_again_while_its_first_removal_is_stuck(tmp_path, stuck):
    hold(tmp_path, 30)
    stuck("step-00000010.deleted")
    for _ in range(2):
        hold(tmp_path, 10)
        retention.tidy(tmp_path, CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["step-00000010.deleted", "step-00000030"]


def test_a_loss_that_is_not_a_number_is_not_the_best(tmp_path):
    for step, loss in ((10, 2.0), (20, float("nan")), (30, float("inf")), (40, 3.0)):
        hold(tmp_path, step, loss)
    assert reasons(readable(tmp_path), CheckpointConfig(every=100, keep_last=1))[10] == ["best"]
    retain(tmp_path, CheckpointConfig(every=100, keep_last=1))
    assert steps(tmp_path) == [40, 10]


def test_a_pinned_checkpoint_that_a_roll_back_removes_is_named(tmp_path, caplog):
    for step in (10, 20, 30):
        (hold(tmp_path, step) / PINNED).touch()
    retention.abandon(tmp_path, 20)
    assert steps(tmp_path) == [20, 10]
    assert caplog.messages == [
        f"{directory(tmp_path, 30)}: was pinned, and is removed: the run rolls back to step 20 and takes the later "
        "steps again with other data"
    ]
