"""Runs that start from another run's weights."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bst_base.json_lines import read_lines
from bst_base.settings import ConfigError, parse
from bst_dist.checkpoint.directory import CheckpointError, committed, directory, load_weights, newest_valid
from bst_dist.config import Recipe, digest
from bst_dist.model.lm import LanguageModel
from bst_dist.report.metrics import FILE
from bst_dist.train.building import build_engine
from bst_dist.train.config import InitialWeightsConfig
from bst_dist.train.run import train
from bst_dist.train.start.initial_weights import load_initial_weights
from bst_dist.train.start.request import Request, load, resolve
from tests.checkpoint.damage import flip
from tests.conftest import write_checkpoint


def weights(run_dir):
    return load_weights(newest_valid(run_dir))


@pytest.fixture
def trained(settings, tmp_path):
    """A run with only a checkpoint of step 5, to take initial weights from."""
    recipe = parse(Recipe, settings | {"model": settings["model"] | {"vocab_size": 320}})
    model = LanguageModel(recipe.model)
    write_checkpoint(directory(tmp_path, 5), model)
    return SimpleNamespace(config=InitialWeightsConfig(run=tmp_path, step=5), model=model, settings=recipe.model)


def test_initial_weights_equal_those_of_the_other_run(trained):
    torch.manual_seed(9)
    model = LanguageModel(trained.settings)
    load_initial_weights(model, trained.config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.model.parameters(), strict=True))


def test_a_model_of_another_shape_is_refused(trained):
    for change, message in (
        ({"ffn": 48}, "ffn.out.weight is (16, 32), here (16, 48)"),
        ({"depth": 4}, "missing"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load_initial_weights(LanguageModel(trained.settings.model_copy(update=change)), trained.config)


def test_initial_weights_of_another_tokenizer_are_refused(trained, tmp_path):
    load_initial_weights(trained.model, trained.config, "abc")  # that run has not recorded its tokenizer
    (tmp_path / "environment.json").write_text(json.dumps({"starts": [{"tokenizer_sha256": "abc"}]}))
    load_initial_weights(trained.model, trained.config, "abc")
    with pytest.raises(CheckpointError, match=r"was trained with another tokenizer than that of data\.corpus"):
        load_initial_weights(trained.model, trained.config, "def")


def test_a_step_without_a_checkpoint_is_refused_with_the_existing_steps(trained, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of step 6; there are: 5"):
        load_initial_weights(trained.model, InitialWeightsConfig(run=tmp_path, step=6))


def test_initial_weights_change_the_digest_of_a_recipe(settings):
    plain = parse(Recipe, settings)
    other = parse(Recipe, settings | {"initial_weights": {"run": "elsewhere", "step": 5}})
    assert digest(plain) != digest(other)


def test_branch_and_initial_weights_exclude_each_other(settings):
    both = {"initial_weights": {"run": "a", "step": 1}, "branch": {"run": "b", "step": 1}}
    with pytest.raises(ConfigError, match="branch and initial_weights"):
        parse(Recipe, settings | both)


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("stage", [1, 3])
def test_training_starts_with_initial_weights_and_resumes_without_them(recipe_file, on_ranks, tmp_path, stage):
    def go(run, *changes, resume=False, until=None):
        request = Request(recipe_file(), changes, tmp_path / run, resume, until)
        on_ranks(2, lambda ranks: train(request, ranks))

    go("first", "train.steps=2")
    changes = [
        f"deepspeed=ds_configs/zero{stage}.json",
        f"initial_weights.run={tmp_path / 'first'}",
        "initial_weights.step=2",
        "optimizer.learning_rate=1e-9",
        "optimizer.ssm_learning_rate=1e-9",
        "optimizer.weight_decay=0",
        "seed=8",
    ]
    go("tuned", *changes, until=2)
    shutil.move(tmp_path / "first", tmp_path / "away")
    go("tuned", *changes, resume=True, until=4)
    for name, weight in weights(tmp_path / "away").items():
        torch.testing.assert_close(weights(tmp_path / "tuned")[name], weight, rtol=0, atol=1e-7)


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_share_the_check_of_initial_weights_and_only_one_loads_them(recipe_file, on_ranks, tmp_path, stage):
    changes = [f"deepspeed=ds_configs/zero{stage}.json", "train.steps=2"]
    first = Request(recipe_file(), changes, tmp_path / "first", False, None)
    on_ranks(2, lambda ranks: train(first, ranks))
    files = {path.name: path.stat().st_size for path in directory(tmp_path / "first", 2).glob("weights-*")}
    changes += [f"initial_weights.run={tmp_path / 'first'}", "initial_weights.step=2", "seed=8"]
    request = Request(recipe_file(), changes, tmp_path / "tuned", False, None)

    def start(ranks):
        """Return the bytes that this rank reads of each file of weights, and whether it has the other run's."""
        read, plain, read_into = Counter(), Path.open, io.FileIO.readinto

        class Counted(io.FileIO):
            def readinto(self, buffer):
                count = read_into(self, buffer)
                read[Path(self.name).name] += count
                return count

            def read(self, size=-1):
                data = super().read(size)
                read[Path(self.name).name] += len(data)
                return data

        def opened(path, mode="r", buffering=-1, **others):
            if path.parent.parent.parent != tmp_path / "first" or not path.name.startswith("weights-"):
                return plain(path, mode, buffering, **others)
            return Counted(path) if buffering == 0 else io.BufferedReader(Counted(path))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", opened)
            engine = build_engine(resolve(load(request), request, ranks.world), ranks, initial=True)
        loaded = {}
        for name, parameter in engine.module.named_parameters():
            with engine.gathered_parameters([parameter]):
                loaded[name] = parameter.detach().clone()
        there = weights(tmp_path / "first")
        assert loaded.keys() == there.keys()
        assert all(torch.equal(loaded[name], there[name]) for name in there)
        return read

    read = on_ranks(2, start)
    assert set(read[0]) == set(files)  # rank 0 loads all, and checks its own
    assert read[1] == {"weights-00001.safetensors": files["weights-00001.safetensors"]}


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_a_rank_that_sees_a_checkpoint_alone_loads_initial_weights_with_the_others(
    recipe_file, on_ranks, tmp_path, monkeypatch
):
    """Its file system shows a directory that the others no longer see; loading takes collectives of all ranks."""
    on_ranks(2, lambda ranks: train(Request(recipe_file(), [], tmp_path / "first", False, 2), ranks))
    changes = [f"initial_weights.run={tmp_path / 'first'}", "initial_weights.step=2"]
    request = Request(recipe_file(), changes, tmp_path / "tuned", False, 1)

    def start(ranks):
        monkeypatch.setattr("bst_dist.train.start.initial_weights.has_full", lambda run_dir: ranks.rank == 1)
        return train(request, ranks)

    assert on_ranks(2, start) == [0, 0]


@pytest.fixture
def tuned(recipe_file, on_ranks, tmp_path):
    """A run that starts with initial weights and was killed after two steps, the second of which has a full checkpoint;
    `resume` continues it, and `starts_again` checks that it begins with these weights."""

    def go(run, *changes, resume=True, from_zero=False):
        request = Request(recipe_file(checkpoint={"every": 4}), changes, tmp_path / run, resume, 2, from_zero)
        on_ranks(1, lambda ranks: train(request, ranks))

    go("first", resume=False)
    changes = [
        f"initial_weights.run={tmp_path / 'first'}",
        "initial_weights.step=2",
        "optimizer.learning_rate=1e-9",
        "optimizer.ssm_learning_rate=1e-9",
        "optimizer.weight_decay=0",
        "seed=8",
        "checkpoint.weights_every=1",
    ]
    run = tmp_path / "tuned"
    go("tuned", *changes, resume=False)
    (run / "outcome.json").unlink()

    def starts_again(**options):
        go("tuned", *changes, **options)
        assert [line["step"] for line in read_lines(run / FILE) if line["kind"] == "train"] == [1, 2]
        assert read_lines(run / "metrics.dropped.jsonl")
        for name, weight in weights(tmp_path / "first").items():
            torch.testing.assert_close(weights(run)[name], weight, rtol=0, atol=1e-7)

    return SimpleNamespace(run=run, resume=lambda: go("tuned", *changes), starts_again=starts_again)


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("from_zero", [False, True])
def test_a_run_killed_before_its_first_full_checkpoint_starts_again_with_initial_weights(tuned, from_zero):
    shutil.rmtree(directory(tuned.run, 2))
    assert committed(tuned.run) == [directory(tuned.run, 1)]
    tuned.starts_again(from_zero=from_zero)


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
def test_a_run_without_a_valid_checkpoint_starts_again_with_initial_weights_only_from_zero(tuned, tmp_path):
    flip(directory(tuned.run, 2) / "optimizer-00000.safetensors")
    shutil.copytree(tuned.run, tmp_path / "before")
    with pytest.raises(AssertionError, match=r"none of its checkpoints is valid; restore one, or start .* --from-zero"):
        tuned.resume()
    shutil.rmtree(tuned.run)
    shutil.move(tmp_path / "before", tuned.run)
    tuned.starts_again(from_zero=True)
