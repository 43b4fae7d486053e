from __future__ import annotations

import json
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
