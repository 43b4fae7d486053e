from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bst_dist.train.checkpoint import (
    FORMAT,
    MANIFEST,
    CheckpointConfig,
    CheckpointError,
    committed,
    damage,
    directory,
    newest_valid,
    retain,
)
from bst_dist.train.ranks import choose_accelerator

choose_accelerator()
from bst_dist.train import weights  # noqa: E402
from bst_dist.train.durable import Files  # noqa: E402


def write(run_dir: Path, step: int) -> Path:
    path = directory(run_dir, step)
    files = Files(path)
    for name in ("engine/a.pt", "b.pt"):
        with files.open(name) as file:
            torch.save({"step": torch.tensor(step)}, file)
    (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files.records}))
    return path


def test_files_record_what_lies_on_the_disk(tmp_path):
    path = write(tmp_path, 1)
    records = json.loads((path / MANIFEST).read_text())["files"]
    for name, record in records.items():
        data = (path / name).read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert torch.load(path / "b.pt")["step"] == 1


@pytest.mark.parametrize(
    ("hurt", "said"),
    [
        (lambda path: (path / "b.pt").unlink(), "b.pt is missing"),
        (lambda path: (path / "b.pt").write_bytes(b""), "b.pt has 0 bytes instead of"),
        (lambda path: flip(path / "engine" / "a.pt"), "engine/a.pt is damaged"),
        (lambda path: (path / MANIFEST).unlink(), "manifest.json cannot be read"),
        (lambda path: (path / MANIFEST).write_text("{"), "manifest.json cannot be read"),
    ],
    ids=["missing", "cut", "flipped", "no manifest", "broken manifest"],
)
def test_newest_valid_passes_over_a_damaged_one(tmp_path, hurt, said):
    older, newer = write(tmp_path, 10), write(tmp_path, 20)
    assert newest_valid(tmp_path) == newer
    hurt(newer)
    assert said in damage(newer)[0]
    assert newest_valid(tmp_path) == older
    hurt(older)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        newest_valid(tmp_path)


def test_readers_who_share_a_checkpoint_find_all_that_one_finds(tmp_path):
    path = write(tmp_path, 1)
    flip(path / "b.pt")
    flip(path / "engine" / "a.pt")
    assert sorted(damage(path, 0, 2) + damage(path, 1, 2)) == sorted(damage(path))


def test_retention_keeps_the_newest_and_what_is_pinned_and_clears_what_was_broken_off(tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    write(tmp_path, 50).rename(directory(tmp_path, 50).with_suffix(".partial"))
    retain(tmp_path, CheckpointConfig(keep_last=2, at=(10,)))
    assert [path.name for path in committed(tmp_path)] == ["step-00000040", "step-00000030", "step-00000010"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000010", "step-00000030", "step-00000040",
    ]  # fmt: skip


def test_weights_are_safetensors_of_the_whole_state(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5).double())
    module[1].weight.data.normal_()
    with (tmp_path / "w.safetensors").open("wb") as file:
        weights.write(module, file, {"step": "1"})
    found = load_file(tmp_path / "w.safetensors")
    expected = module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.float()), name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
