"""Branches: a run that takes its first steps from a trunk equals a run that trains its recipe from the start."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from bst_base.settings import ConfigError, dump, parse
from bst_dist.checkpoint.directory import CheckpointError, directory
from bst_dist.config import Recipe
from bst_dist.train.start.branch import trunk_checkpoint
from bst_dist.train.start.directory import evidence_of_checkpoints

SETTINGS = {
    "name": "trunk",
    "model": {"width": 32, "heads": 2, "ffn": 64, "block": 32, "depth": 2, "mixer": "bst", "vocab_size": 300},
    "data": {"corpus": "none"},
    "train": {"steps": 8, "sequence_length": 64, "sequences": 4, "micro_sequences": 4},
    "schedule": {"warmup_steps": 2, "decay_fraction": 0.0},
}


@pytest.fixture
def runs(tmp_path):
    """A trunk with a checkpoint at step 8, and a function that makes a branch of it with changed sections."""
    trunk = tmp_path / "trunk"
    directory(trunk, 8).mkdir(parents=True)
    (trunk / "recipe.yaml").write_text(dump(parse(Recipe, SETTINGS)))

    def branch(step=8, **changes):
        own = {"name": "b", "branch": {"run": "../trunk", "step": step}, "schedule": {"warmup_steps": 2}}
        train = {**SETTINGS["train"], "steps": 10}
        return parse(Recipe, {**SETTINGS, "train": train, **own, **changes})

    return SimpleNamespace(trunk=trunk, branch=branch, directory=tmp_path / "b")


def test_a_branch_of_the_same_steps_begins_at_the_checkpoint(runs):
    assert trunk_checkpoint(runs.directory, runs.branch()) == directory(runs.trunk, 8)


def test_the_trunk_may_be_given_from_the_home_directory(runs, monkeypatch):
    monkeypatch.setenv("HOME", str(runs.trunk.parent))
    branch = runs.branch(branch={"run": "~/trunk", "step": 8})
    assert trunk_checkpoint(runs.directory / "deeper", branch) == directory(runs.trunk, 8)


def test_a_smaller_micro_batch_is_still_a_branch(runs):
    train = {**SETTINGS["train"], "steps": 10, "micro_sequences": 2}
    assert trunk_checkpoint(runs.directory, runs.branch(train=train)) == directory(runs.trunk, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "seed: 0, 3"),
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate"),
        ({"schedule": {"warmup_steps": 2, "decay_fraction": 0.9}}, "learning rates differ from step 3 on"),
        ({"schedule": {"warmup_steps": 3}}, "learning rates differ from step 0 on"),
        ({"step": 7}, r"train the trunk first, with checkpoint.at: \[7\]"),
    ],
)
def test_a_branch_that_differs_from_the_trunk_steps_is_refused(runs, changes, message):
    with pytest.raises(CheckpointError, match=message):
        trunk_checkpoint(runs.directory, runs.branch(**changes))


def test_differences_beyond_those_that_are_listed_are_counted(runs):
    rates = {
        "learning_rate": 0.5,
        "ssm_learning_rate": 1e-4,
        "weight_decay": 0.3,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-6,
    }
    train = {**SETTINGS["train"], "steps": 10, "z_loss": 0.1, "gradient_clipping": 0.5}
    with pytest.raises(CheckpointError, match="and 1 more"):
        trunk_checkpoint(runs.directory, runs.branch(seed=3, optimizer=rates, train=train))


@pytest.mark.parametrize(("from_step", "steps", "shown"), [(8, 1, None), (9, 1, "step 9"), (8, 5, "due at step 10")])
def test_a_branch_shows_reached_steps_only_after_its_first_checkpoint(runs, from_step, steps, shown):
    """It begins at a step of the trunk, so it has no checkpoint of its own."""
    train = {**SETTINGS["train"], "steps": 20}
    runs.directory.mkdir()
    (runs.directory / "recipe.yaml").write_text(dump(runs.branch(train=train, checkpoint={"every": 5})))
    (runs.directory / "environment.json").write_text(
        json.dumps({"starts": [{"from_step": 8}, {"from_step": from_step}]})
    )
    lines = [json.dumps({"kind": "train", "step": step}) for step in range(9, 9 + steps)]
    (runs.directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found = evidence_of_checkpoints(runs.directory)
    assert found is None if shown is None else shown in found


def test_a_branch_must_have_steps_of_its_own(runs):
    with pytest.raises(ConfigError, match=r"must be below train\.steps, 10"):
        runs.branch(step=10)
