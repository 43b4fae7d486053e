"""`bst ckpt ls|show|verify|pin|gc|convert`, as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bst_base.settings import dump, parse
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import committed, directory, load_weights, step_of
from bst_dist.checkpoint.fragments import MOMENTS, WEIGHT, Fragment
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.shards import Piece
from bst_dist.checkpoint.snapshot import Identity, Position, Snapshots
from bst_dist.cli import main
from bst_dist.config import Recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.mesh import Mesh
from tests.checkpoint.damage import flip

SETTINGS = {
    "name": "r",
    "data": {"corpus": "none"},
    "train": {"steps": 60, "sequence_length": 32, "sequences": 2},
    "model": {
        "vocab_size": 64,
        "width": 16,
        "heads": 2,
        "ffn": 16,
        "block": 8,
        "depth": 2,
        "mixer": "bst",
        "ssm": {"chunk": 4},
    },
    "checkpoint": {"keep_last": 1, "keep_best": 0},
}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run of two ranks with full checkpoints of steps 10, 20 and 30 and the weights of step 40."""
    recipe = parse(Recipe, SETTINGS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(recipe))
    for step in (10, 20, 30, 40):
        torch.manual_seed(step)
        write(tmp_path / "run", LanguageModel(recipe.model), step, full=step < 40)
    return tmp_path / "run"


def write(run_dir: Path, model: LanguageModel, step: int, full: bool) -> None:
    """Write a checkpoint as a run with one rank does."""
    fragments = []
    for name, parameter in model.named_parameters():
        values = dict.fromkeys((WEIGHT, *MOMENTS), parameter.detach().flatten())
        fragments.append(Fragment(Piece(name, tuple(parameter.shape), 0, parameter.numel()), values))
    shapes = {fragment.piece.name: fragment.piece.shape for fragment in fragments}
    state = SimpleNamespace(owned=lambda: fragments, shapes=lambda: shapes, moments=dict, updates=lambda: step)
    ranks = SimpleNamespace(
        rank=0,
        world=1,
        first=True,
        device=torch.device("cpu"),
        all_reduce_numbers=lambda values: values,
        all_gather_object=lambda value: [value],
        broadcast_object=lambda value: value,
    )
    groups = {"matrices": {"lr": 0.1}}
    identity = Identity("digest", groups, 0, Layout(1, 1, 2), Rows(2, 1, Mesh(1, 0)))
    run = Snapshots(run_dir, state, ranks, identity, CheckpointConfig(keep_last=9, weights_every=40))
    run.start(Position(step, 64 * step, {"mode": "shuffled"}, []), validation_loss=100 / step, full=full)
    run.finish()


def steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in committed(run_dir)]


def ckpt(*arguments: Any, report: Path | None = None) -> tuple[int, dict[str, Any]]:
    status = main(["ckpt", *map(str, arguments), *(["--json", str(report)] if report else [])])
    return status, json.loads(report.read_text()) if report else {}


def test_ls_lists_steps_damage_losses_and_leftovers(run_dir, tmp_path, capsys):
    (directory(run_dir, 20) / "optimizer-00000.safetensors").unlink()
    (run_dir / "checkpoints" / "step-00000050.partial").mkdir()
    status, report = ckpt("ls", run_dir, report=tmp_path / "r.json")
    assert status == 0
    rows = {row["step"]: row for row in report["checkpoints"]}
    assert list(rows) == [40, 30, 20, 10]
    assert [rows[step]["full"] for step in rows] == [False, True, True, True]
    assert rows[30]["kept_as"] == ["newest"]
    assert rows[20]["damage"] == ["missing: rank 0's file optimizer-00000.safetensors"]
    assert rows[10]["validation_loss_nats"] == 10.0
    assert rows[10]["layout"] == {"ranks": 1, "sp": 1, "zero_stage": 2}
    assert report["leavings"] == ["step-00000050.partial"]
    assert "3.3333" in capsys.readouterr().out


def test_show_describes_a_checkpoint_and_refuses_a_missing_step(run_dir, capsys):
    assert ckpt("show", run_dir, "--step", 30)[0] == 0
    said = capsys.readouterr().out
    assert "full: a run can resume from it" in said
    assert "1 rank (dp 1 x sp 1, ZeRO-2)" in said
    assert "3.3333 nats" in said
    assert ckpt("show", run_dir, "--step", 31)[0] == 2
    assert "no checkpoint of step 31; there are: 40, 30, 20, 10" in capsys.readouterr().err


def test_verify_names_the_file(run_dir, capsys):
    assert ckpt("verify", run_dir)[0] == 0
    flip(directory(run_dir, 20) / "optimizer-00000.safetensors")
    assert ckpt("verify", run_dir)[0] == 1
    assert "checksum mismatch in rank 0's file optimizer-00000.safetensors" in capsys.readouterr().out
    assert ckpt("verify", run_dir, "--step", 30)[0] == 0


def test_gc_without_delete_only_lists_removals(run_dir, tmp_path):
    status, report = ckpt("gc", run_dir, report=tmp_path / "r.json")
    assert status == 0
    assert set(report["removals"]) == {"step-00000040", "step-00000020", "step-00000010"}
    assert steps(run_dir) == [40, 30, 20, 10]


def test_gc_keeps_pinned_checkpoints_and_applies_given_settings(run_dir):
    ckpt("pin", run_dir, "--step", 10)
    ckpt("pin", run_dir, "--step", 20)
    ckpt("pin", run_dir, "--step", 20, "--remove")
    assert ckpt("gc", run_dir, "checkpoint.weights_every=20", "--delete")[0] == 0
    assert steps(run_dir) == [40, 30, 20, 10]
    assert not (directory(run_dir, 20) / "optimizer-00000.safetensors").exists()
    assert ckpt("verify", run_dir)[0] == 0
    assert ckpt("gc", run_dir, "--delete")[0] == 0
    assert steps(run_dir) == [30, 10]


def test_gc_does_not_count_a_damaged_checkpoint_as_newest(run_dir):
    flip(directory(run_dir, 30) / "weights-00000.safetensors")
    assert ckpt("gc", run_dir, "--delete")[0] == 0
    assert steps(run_dir) == [20]


@pytest.mark.parametrize("name", ["manifest.json", "optimizer-00000.safetensors"])
def test_gc_keeps_a_checkpoint_of_which_this_host_does_not_see_a_file(run_dir, name):
    (directory(run_dir, 20) / name).unlink()
    assert ckpt("gc", run_dir, "--delete")[0] == 0
    assert steps(run_dir) == [30, 20]


def test_gc_removes_nothing_when_no_full_checkpoint_is_valid(run_dir):
    for step in (10, 20, 30):
        flip(directory(run_dir, step) / "weights-00000.safetensors")
    assert ckpt("gc", run_dir, "--delete")[0] == 0
    assert steps(run_dir) == [40, 30, 20, 10]


def test_gc_removes_a_step_whose_earlier_removal_was_interrupted(run_dir):
    """The run took step 20 again after a kill had left half of the first one behind."""
    half = directory(run_dir, 20).with_name("step-00000020.deleted")
    shutil.copytree(directory(run_dir, 20), half)
    assert ckpt("gc", run_dir, "--delete")[0] == 0
    assert sorted(path.name for path in half.parent.iterdir()) == [half.name, "step-00000030"]  # the half one is recent


def test_ls_and_gc_see_what_a_newer_checkpoint_has_replaced(run_dir, tmp_path):
    """The run was killed after the newer checkpoint got its name, and before the older one was removed."""
    older = directory(run_dir, 30).with_name("step-00000030.replaced")
    shutil.copytree(directory(run_dir, 30), older)
    for path in (older, *older.iterdir()):
        os.utime(path, (0, 0))
    assert ckpt("ls", run_dir, report=tmp_path / "r.json")[1]["leavings"] == [older.name]
    assert older.name in ckpt("gc", run_dir, "--delete", report=tmp_path / "r.json")[1]["removals"]
    assert not older.exists()
    assert steps(run_dir) == [30]


def test_of_a_linked_checkpoint_gc_removes_only_the_link(run_dir, tmp_path):
    archive = tmp_path / "archive"
    directory(run_dir, 20).rename(archive)
    directory(run_dir, 20).symlink_to(archive)
    files = sorted(archive.iterdir())
    lost = run_dir / "checkpoints" / "step-00000005.deleted"
    lost.symlink_to(tmp_path / "gone")
    os.utime(lost, (0, 0), follow_symlinks=False)
    assert ckpt("gc", run_dir, "checkpoint.weights_every=20", report=tmp_path / "r.json")[1]["removals"].keys() == {
        "step-00000010",
        lost.name,
    }  # of step 20 the weights are kept, and the archive has them
    there = directory(run_dir, 10), directory(run_dir, 40)
    size = sum(file.stat().st_size for path in there for file in path.iterdir())
    status, report = ckpt("gc", run_dir, "--delete", report=tmp_path / "r.json")
    assert (status, report["bytes"]) == (0, size)
    assert sorted(path.name for path in lost.parent.iterdir()) == ["step-00000030"]
    assert sorted(archive.iterdir()) == files


def test_gc_removes_nothing_beside_a_checkpoint_of_a_newer_format(run_dir, capsys):
    manifest = directory(run_dir, 40) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 3}))
    assert ckpt("gc", run_dir, "--delete")[0] == 2
    assert "step-00000040: written by another version of this program, in format 3" in capsys.readouterr().err
    assert steps(run_dir) == [40, 30, 20, 10]


def test_gc_keeps_recent_partial_directories(run_dir):
    partial = run_dir / "checkpoints" / "step-00000050.partial"
    partial.mkdir()
    ckpt("gc", run_dir, "--delete")
    assert partial.exists()
    long_ago = time.time() - 4000
    os.utime(partial, (long_ago, long_ago))
    ckpt("gc", run_dir, "--delete")
    assert not partial.exists()


@pytest.mark.parametrize("limit", [None, 10_000])
def test_converted_weights_equal_the_checkpoint(run_dir, tmp_path, limit):
    options = ["--file-size", limit] if limit else []
    assert ckpt("convert", run_dir, tmp_path / "out", "--step", 30, "--dtype", "bf16", *options)[0] == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    wanted = load_weights(directory(run_dir, 30))
    assert found.keys() == wanted.keys()
    kept = {name.rpartition(".")[2] for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert kept == {"log_dt", "log_decay", "frequency"}
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    if limit:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert len(files) == 2
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert ckpt("convert", run_dir, tmp_path / "out")[0] == 2


def test_a_damaged_checkpoint_is_not_converted(run_dir, tmp_path, capsys):
    flip(directory(run_dir, 30) / "weights-00000.safetensors")
    assert ckpt("convert", run_dir, tmp_path / "out", "--step", 30)[0] == 2
    assert "checksum mismatch in rank 0's file weights-00000.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
