"""The index in a manifest, compared with the headers of the files and with the values read through it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bst_dist.checkpoint import exporting
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import (
    INDEX,
    MANIFEST,
    OPTIMIZER,
    WEIGHTS,
    directory,
    open_shards,
    read_manifest,
)
from bst_dist.checkpoint.fragments import Fragment
from bst_dist.checkpoint.index import Division, Index, build_index, equal_part
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.shards import Piece
from bst_dist.checkpoint.snapshot import Identity, Position, Snapshots
from bst_dist.parallel.mesh import Mesh
from bst_dist.tools.bench.lockstep import Counting, Counts, SyntheticState, World, flat, spread

SHAPES = {"embedding": (37, 8), "norm": (8,), "bias": (1,), "matrix": (8, 24), "last": (5, 5)}
MUON = ("embedding", "matrix")
"""Parameters that only have the first moment, because Muon updates them."""


class OwnState(SyntheticState):
    """Synthetic state in which Muon updates some parameters and AdamW the others."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        for fragment in self.held():
            if fragment.piece.name in MUON:
                del fragment.values["exp_avg_sq"]

    def moments(self) -> dict[str, int]:
        return dict.fromkeys(MUON, 1)


def snapshots(folder: Path, ranks: Any, stage: int, filled: bool) -> tuple[Snapshots, SyntheticState]:
    state = OwnState(SHAPES, ranks.rank, ranks.world, stage, filled)
    rows = Rows(1680, 1, Mesh(ranks.world, ranks.rank))
    identity = Identity("recipe", {}, 0, Layout(ranks.world, 1, stage), rows)
    return Snapshots(folder, state, ranks, identity, CheckpointConfig(background=False)), state


def save(folder: Path, world: int, stage: int) -> Path:
    def on_rank(ranks: Any) -> Any:
        saved, _ = snapshots(folder, ranks, stage, filled=True)
        assert saved.start(Position(3, 30, {}, [])) is None
        return saved.finish()

    World(world).run(on_rank)
    return directory(folder, 3)


def load(folder: Path, world: int, stage: int) -> list[Counts]:
    """Load under another layout and check every value; return each rank's counts."""

    def on_rank(ranks: Any) -> Counts:
        own, state = snapshots(folder, ranks, stage, filled=False)
        with Counting(Counts()) as counts:
            checkpoint, damaged = own.newest()
            position = own.load(checkpoint)
        assert not damaged
        assert position.step == 3
        assert state.is_right()
        return counts

    return World(world).run(on_rank)[0]


def opened(counts: Counts) -> list[str]:
    return [Path(path).name for path in counts.opens if "step-" in path]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_the_index_equals_the_headers_of_the_files(tmp_path, world, stage):
    path = save(tmp_path, world, stage)
    manifest = read_manifest(path)
    index = Index.of(manifest[INDEX])
    for kind, prefixes in ((WEIGHTS, ("",)), (OPTIMIZER, ("exp_avg/", "exp_avg_sq/"))):
        places = open_shards(path, kind, manifest=manifest)._places
        for rank in range(world):
            name = f"{kind}-{rank:05d}.safetensors"
            start, header = read_header(path / name)
            assert manifest["files"][name]["start"] == start
            held = {
                prefix + one
                for prefix in prefixes
                for one, d in index.divisions.items()
                if d.run(rank)[1] and not (prefix == "exp_avg_sq/" and one in MUON)
            }
            assert held == header.keys()
            for one, entry in header.items():
                stored = places.stored(rank, one)
                assert (stored.offset, 4 * stored.piece.count) == (
                    start + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == header.keys()
    return 8 + length, header


HOPS = [((6, 1), (3, 1)), ((3, 1), (7, 3)), ((4, 3), (8, 1)), ((8, 3), (5, 3)), ((1, 1), (4, 3)), ((5, 3), (1, 1))]


@pytest.mark.parametrize(("before", "after"), HOPS)
def test_another_layout_reads_only_the_needed_bytes_and_no_headers(tmp_path, before, after):
    path = save(tmp_path, *before)
    manifest = read_manifest(path)
    load(tmp_path, *after)  # warm up: the first load also imports modules
    ranks = load(tmp_path, *after)
    state = [OwnState(SHAPES, rank, *after, filled=False) for rank in range(after[0])]
    sources = [OwnState(SHAPES, rank, *before, filled=False) for rank in range(before[0])]
    small = len((path / MANIFEST).read_bytes())
    digested = sum(record["bytes"] for record in manifest["files"].values())
    carried = sum(record["bytes"] for name, record in manifest["files"].items() if name.startswith("rank"))
    read = sum(rank.read_bytes for rank in ranks)
    wanted = sum(len(one.values) * 4 * one.piece.count for own in state for one in own.held())
    assert read - digested - wanted <= 2 * small + after[0] * carried + 2000 * after[0]
    for number, (rank, own) in enumerate(zip(ranks, state, strict=True)):
        holders = sum(any(overlap(one, other) for one in own.held() for other in source.held()) for source in sources)
        names = Counter(name.split("-")[0] for name in opened(rank))
        digests = Counter(name.split("-")[0] for name in sorted(manifest["files"])[number :: after[0]])
        assert names["weights"] - digests["weights"] == names["optimizer"] - digests["optimizer"] == holders
        assert names["rank"] - digests["rank"] <= before[0] // after[0] + 2  # only files of ranks whose rows it now has
        assert names["manifest.json"] == 2 * (number == 0)


def overlap(one: Fragment, other: Fragment) -> bool:
    a, b = one.piece, other.piece
    return a.name == b.name and max(a.begin, b.begin) < min(a.begin + a.count, b.begin + b.count)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_same_layout_opens_few_files_for_any_number_of_ranks(tmp_path, stage):
    most = set()
    for world in (2, 12):
        save(tmp_path / str(world), world, stage)
        ranks = load(tmp_path / str(world), world, stage)
        most.add(max(len(opened(rank)) for rank in ranks[1:]))
    assert most == {6}  # three files for their digests, and again for their content
    assert len(opened(ranks[0])) <= 8


def test_a_checkpoint_without_an_index_is_read_from_its_headers(tmp_path):
    path = save(tmp_path, 4, 3)
    manifest = read_manifest(path)
    del manifest[INDEX]
    (path / MANIFEST).write_text(json.dumps(manifest))
    ranks = load(tmp_path, 3, 1)
    assert all(len(opened(rank)) > 2 * 4 for rank in ranks)


def test_manifest_size_is_linear_in_parameters_plus_ranks(tmp_path):
    shapes = {f"layer {number}": (64, 3) for number in range(200)}
    spreads = []
    for ranks in (8, 64):
        index, _ = World(ranks).run(
            lambda rank, ranks=ranks: build_index(rank, shapes, pieces(shapes, rank.rank, ranks, 3))
        )
        spreads.append(len(json.dumps(index[0].described())))
        cut, _ = World(ranks).run(
            lambda rank, ranks=ranks: build_index(rank, shapes, pieces(shapes, rank.rank, ranks, 1))
        )
        assert len(json.dumps(cut[0].described())) < 70 * (len(shapes) + ranks)
    assert abs(spreads[1] - spreads[0]) <= 1  # depends only on the number of ranks


def pieces(shapes: dict[str, tuple[int, ...]], rank: int, ranks: int, stage: int) -> list[Piece]:
    runs = (spread if stage == 3 else flat)(shapes, rank, ranks)
    return [Piece(name, shapes[name], *run) for name, run in runs.items() if run[1]]


def test_pieces_that_do_not_cover_a_parameter_are_refused():
    runs = [Piece("a", (10,), 0, 4), Piece("a", (10,), 5, 5)]
    with pytest.raises(RuntimeError, match="a: rank 1 holds its elements from 5 on, the ranks before it only up to 4"):
        World(2).run(lambda ranks: build_index(ranks, {"a": (10,)}, [runs[ranks.rank]]))
    with pytest.raises(RuntimeError, match="a: the ranks hold 4 of its 10 elements"):
        World(2).run(lambda ranks: build_index(ranks, {"a": (10,)}, runs[:1] if ranks.first else []))


def test_holders_are_the_ranks_with_overlapping_elements():
    chance = random.Random(0)
    for _ in range(300):
        ranks, numel = chance.randint(1, 6), chance.randint(1, 20)
        cuts = sorted(chance.choices(range(numel + 1), k=ranks - 1))
        equal = chance.random() < 0.5
        division = Division((numel,), ranks) if equal else Division((numel,), ranks, 0, (0, *cuts, numel))
        runs = [division.run(rank) for rank in range(ranks)]
        assert runs == ([equal_part(numel, rank, ranks) for rank in range(ranks)] if equal else runs)
        assert [element for begin, count in runs for element in range(begin, begin + count)] == list(range(numel))
        begin = chance.randrange(numel)
        end = chance.randint(begin, numel)
        wanted = {rank for rank, (first, count) in enumerate(runs) if max(first, begin) < min(first + count, end)}
        found = set(division.holders(begin, end))
        assert wanted <= found
        assert all(not runs[rank][1] for rank in found - wanted)


def test_reading_all_tensors_opens_each_file_once(tmp_path):
    path = save(tmp_path, 5, 3)
    weights, counts = open_shards(path, WEIGHTS), Counts()
    with Counting(counts):
        found = weights.all_of(weights.shapes)
    assert [Path(name).name for name in counts.opens] == [f"weights-{rank:05d}.safetensors" for rank in range(5)]
    right = SyntheticState(SHAPES, 0, 1, 1, filled=True)
    for one in right.held():
        assert torch.equal(found[one.piece.name].flatten(), one.values["weight"])
        assert found[one.piece.name].shape == SHAPES[one.piece.name]


@pytest.mark.parametrize("file_size", [1e9, 1e3])
@pytest.mark.parametrize(("at_a_time", "rounds"), [(2**30, 1), (4 * 37 * 8, 2), (1, 5)])
def test_exporting_weights_in_parts_opens_few_files(tmp_path, monkeypatch, at_a_time, rounds, file_size):
    weights, counts = open_shards(save(tmp_path, 4, 3), WEIGHTS), Counts()
    monkeypatch.setattr(exporting, "AT_A_TIME", at_a_time)
    with Counting(counts):
        names = exporting.write_weights(tmp_path, weights, dict.fromkeys(SHAPES, torch.float32), file_size, {})
    assert sum("weights-" in name for name in counts.opens) <= 4 * max(rounds, len(names))
    found = {name: tensor for one in names for name, tensor in load_file(tmp_path / one).items()}
    assert len(names) == (1 if file_size == 1e9 else 2)
    for one in SyntheticState(SHAPES, 0, 1, 1, filled=True).held():
        assert torch.equal(found[one.piece.name].flatten(), one.values["weight"])
