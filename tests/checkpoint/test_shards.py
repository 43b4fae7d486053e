from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bst_dist.checkpoint.shards import CheckpointShardError, Headers, Piece, Shards, write

TENSORS = {"a": (3, 5), "b": (7,), "c.d": (2, 2, 2)}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in TENSORS.items()}


def write_spread(folder, world: int) -> list:
    """Write the tensors to one file per rank, cut at different positions; return the paths."""
    paths = []
    for rank in range(world):
        pieces, values = [], []
        for offset, (name, tensor) in enumerate(tensors().items()):
            numel = tensor.numel()
            cuts = [0, *((numel * (i + 1) + offset) // (world + 1) for i in range(world - 1)), numel]
            if cuts[rank] < cuts[rank + 1]:
                pieces.append(Piece(name, tuple(tensor.shape), cuts[rank], cuts[rank + 1] - cuts[rank]))
                values.append(tensor.flatten()[cuts[rank] : cuts[rank + 1]])
        paths.append(folder / f"{rank}.safetensors")
        with paths[-1].open("wb") as file:
            write(file, pieces, [one.split(3) for one in values])
    return paths


def test_the_file_of_a_single_rank_is_ordinary_safetensors(tmp_path):
    (path,) = write_spread(tmp_path, 1)
    found = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == TENSORS
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_element_range_is_read_from_any_number_of_shards(tmp_path, world):
    shards = Shards(Headers(write_spread(tmp_path, world)))
    assert shards.shapes == TENSORS
    found = shards.all_of(TENSORS)
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor)
        for begin in range(tensor.numel()):
            for end in range(begin, tensor.numel() + 1):
                into = torch.full((end - begin,), math.nan)
                shards.fill([(name, begin, into)])
                assert torch.equal(into, tensor.flatten()[begin:end])


def test_a_missing_shard_is_reported(tmp_path):
    shards = Shards(Headers(write_spread(tmp_path, 3)[:2]))
    with pytest.raises(CheckpointShardError, match="a: 7 of its elements 0 to 15 are in the shards"):
        shards.all_of(["a"])
    with pytest.raises(CheckpointShardError, match="nothing"):
        shards.fill([("nothing", 0, torch.empty(1))])


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 100], ids=["empty", "no header", "noise"])
def test_a_file_that_is_not_a_shard_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointShardError, match="x: not a shard"):
        Headers([tmp_path / "x"])


def test_a_truncated_shard_is_refused(tmp_path):
    (path,) = write_spread(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointShardError, match=r"ends in the middle of c\.d"):
        Shards(Headers([path])).all_of(["c.d"])


def opens(monkeypatch) -> list[str]:
    names, original = [], Path.open

    def counted(path, *args, **named):
        names.append(path.name)
        return original(path, *args, **named)

    monkeypatch.setattr(Path, "open", counted)
    return names


def test_a_rank_opens_only_its_own_file_to_read_its_data(tmp_path, monkeypatch):
    paths = write_spread(tmp_path, 3)
    held = load_file(paths[1])
    names = opens(monkeypatch)
    shards = Shards(Headers(paths, likely=paths[1]))
    for name, begin in (("a", 3), ("b", 2), ("c.d", 2)):
        assert shards.shape(name) == TENSORS[name]
        into = torch.empty(held[name].numel())
        shards.fill([(name, begin, into)])
        assert torch.equal(into, held[name].flatten())
    assert names == ["1.safetensors"] * 2  # its header, its values


def test_tensors_missing_in_the_likely_file_are_found_in_others(tmp_path):
    paths = write_spread(tmp_path, 3)
    shards = Shards(Headers(paths, likely=paths[2]))
    assert torch.equal(shards.all_of(["a"])["a"], tensors()["a"])
    assert Shards(Headers(paths, likely=paths[2])).shapes.keys() == TENSORS.keys()
    assert Shards(Headers(paths, likely=paths[2])).shape("nothing") is None
