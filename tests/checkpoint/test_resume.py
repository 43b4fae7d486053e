"""A run that was stopped and resumed equals one that never stopped: losses and weights are bitwise equal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from bst_dist.checkpoint import saving, snapshot
from bst_dist.checkpoint.directory import committed, damage, directory, newest_valid, read_manifest
from bst_dist.checkpoint.fragments import EngineState
from bst_dist.parallel.ranks import Ranks
from bst_dist.train import building
from bst_dist.train.run import train
from bst_dist.train.start.request import Request, load, resolve

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("unmeasured")]
Go = Callable[..., None]


@pytest.fixture
def go(recipe_file, train_in) -> Go:
    """Train the small recipe; see `train_in`."""
    return train_in(recipe_file(train={"precision": "bf16", "sequences": 8, "micro_sequences": 2}))


@pytest.mark.parametrize("stage", range(4))
def test_resumed_run_equals_the_uninterrupted_one_on_two_ranks(
    go, assert_same_run, tmp_path, recipe_file, on_ranks, stage
):
    changes = (f"deepspeed=ds_configs/zero{stage}.json", "data.mode=streaming", "train.carry=true")
    go("whole", *changes, world=2)
    go("parts", *changes, world=2, until=4)
    go("parts", *changes, world=2, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_groups_keep_their_hyperparameters_through_a_resume_in_every_stage(recipe_file, tmp_path, on_ranks):
    recipe = recipe_file(optimizer={"learning_rate": 2e-3, "ssm_learning_rate": 5e-4, "weight_decay": 0.3})
    wanted = {"matrices": (2e-3, 0.3), "vectors": (2e-3, 0.0), "ssm": (5e-4, 0.0)}

    def groups_of(ranks: Ranks) -> list[dict[str, Any]]:
        found = []
        for stage in range(4):
            changes = [f"deepspeed=ds_configs/zero{stage}.json"]
            request = Request(recipe, changes, tmp_path / f"run{stage}", True, 2)
            train(request, ranks)
            start = resolve(load(request), request, ranks.world)
            engine = building.build_engine(start, ranks)
            identity = building.identity_of(start, engine, ranks)
            state = EngineState(engine.deepspeed)
            snapshots = snapshot.Snapshots(start.run_dir, state, ranks, identity, start.recipe.checkpoint)
            snapshots.load(directory(start.run_dir, 2))
            for group in engine.deepspeed.optimizer.param_groups:
                group.update(weight_decay=9.0, betas=(0.0, 0.0))  # as if loading had mixed up the groups
            engine.set_rates(1.0)
            groups = engine.deepspeed.optimizer.param_groups
            found.append([{key: group[key] for key in ("lr", "betas", "weight_decay")} for group in groups])
        return found

    for groups in on_ranks(2, groups_of)[0]:
        assert [(group["lr"], group["weight_decay"]) for group in groups] == list(wanted.values())
        assert all(tuple(group["betas"]) == (0.9, 0.95) for group in groups)


def test_newest_valid_checkpoint_is_used_and_damage_is_reported(go, assert_same_run, tmp_path, capfd):
    go("whole")
    go("parts", until=4)
    damaged = directory(tmp_path / "parts", 4) / "weights-00000.safetensors"
    flipped = bytearray(damaged.read_bytes())
    flipped[-1] ^= 1
    damaged.write_bytes(flipped)
    assert newest_valid(tmp_path / "parts") == directory(tmp_path / "parts", 2)
    go("parts", resume=True)
    said = capfd.readouterr().out
    assert "checkpoint 4: checksum mismatch in rank 0's file weights-00000.safetensors; resuming from 2" in said
    assert "resumed from step 2" in said
    assert (tmp_path / "parts" / "checkpoints" / "step-00000004.damaged" / "manifest.json").exists()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("moment", ["write", "_commit"], ids=["while writing", "before the commit"])
def test_a_kill_during_a_save_leaves_the_previous_checkpoint(go, assert_same_run, tmp_path, monkeypatch, moment):
    original = getattr(saving, moment)

    def killed(*args: Any) -> Any:
        if list((tmp_path / "parts" / "checkpoints").glob("step-00000004.*.partial")):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="died"):
        patch.setattr(saving, moment, killed)
        go("parts")
    assert committed(tmp_path / "parts") == [directory(tmp_path / "parts", 2)]
    assert not damage(directory(tmp_path / "parts", 2))
    go("parts", resume=True)
    go("whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert not list((tmp_path / "parts" / "checkpoints").glob("*.partial"))


def test_manifest_lists_every_file_and_describes_the_run(go, tmp_path):
    go("run", world=2, until=2)
    checkpoint = newest_valid(tmp_path / "run")
    manifest = read_manifest(checkpoint)
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert there == {*manifest["files"], "manifest.json"}
    assert {record["rank"] for record in manifest["files"].values()} == {0, 1}
    assert manifest["step"] == 2
    assert manifest["tokens"] == 2 * 8 * 32
    assert manifest["data"]["step"] == 2
    assert manifest["groups"]["ssm"]["weight_decay"] == 0
