"""The counts of `bst bench scale`, compared with those that follow from the checkpoint format."""

from __future__ import annotations

import json

import pytest

from bst_dist.cli import main
from bst_dist.faults.watchdog import BEAT_S
from bst_dist.tools.bench import scale
from bst_dist.tools.bench.lockstep import World
from bst_dist.tools.bench.scale import measure

PARAMETERS = 5


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return {ranks: measure(tmp_path_factory.mktemp(str(ranks)), ranks, PARAMETERS) for ranks in (4, 8)}


def costs(one):
    return {cost["work"].strip(): cost for cost in one["costs"]}


@pytest.mark.parametrize("ranks", [4, 8])
def test_counts_of_files_and_opens_equal_arithmetic(found, ranks):
    one = found[ranks]
    assert one["files"] == 3 * ranks + 1
    assert one["heartbeats_per_s"] == ranks / BEAT_S
    cost = costs(one)
    save, same, half = cost["save"], cost["load, same layout"], cost["load, half the ranks"]
    assert (save["opens"], save["all_opens"]) == (4, 3 * ranks + 1)
    # Two for the index, one for the directory, two waits for the files, the outcomes, the commit, a wait for removals.
    assert save["collectives"] == 8
    # Three files for their digests and again for their content; the first rank reads the manifest for all ranks.
    assert (same["opens"], same["all_opens"]) == (8, 6 * ranks + 2)
    # Six files per rank for their digests, two of each kind for their content, and the per-rank files of two ranks.
    assert (half["opens"], half["all_opens"]) == (6 + 4 + 2 + 2, 12 * (ranks // 2) + 2)
    assert cost["its weights and moments"]["opens"] == 4
    assert cost["and without the index"]["opens"] == 2 * ranks + 4
    assert cost["the same ranks, ZeRO-3"]["opens"] <= min(2 * ranks, 2 * 2 * PARAMETERS)


def test_work_per_rank_does_not_grow_with_the_world_size(found):
    small, large = costs(found[4]), costs(found[8])
    for work in ("save", "load, same layout", "load, half the ranks", "its weights and moments", "a report"):
        for what in ("opens", "collectives"):
            assert small[work][what] == large[work][what], (work, what)
    assert large["and without the index"]["opens"] > small["and without the index"]["opens"]


def test_measuring_some_ranks_gives_the_counts_of_all(found, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "ALL_LOAD", 3)
    monkeypatch.setattr(scale, "SOME", 3)
    some, every = measure(tmp_path, 8, PARAMETERS), found[8]
    for one, other in zip(some["costs"], every["costs"], strict=True):
        for what in ("work", "opens", "all_opens", "collectives"):  # bytes depend on the length of the path
            assert one[what] == other[what], (one["work"], what)


def test_working_ranks_represent_the_idle_ranks_before_them():
    world = World(8, at_work=3)
    assert world.at_work == [0, 4, 7]
    found, _ = world.run(lambda rank: (rank.rank, rank.all_gather_object(rank.rank)))
    assert [rank for rank, _ in found] == [0, 4, 4, 4, 4, 7, 7, 7]
    assert all(heard == [0, 4, 4, 4, 4, 7, 7, 7] for _, heard in found)


def test_a_report_takes_one_collective(found):
    for ranks, one in found.items():
        report = costs(one)["a report"]
        assert report["collectives"] == 1
        assert report["received_bytes"] == 8 * 49 * ranks


def test_bench_scale_prints_and_writes_its_report(tmp_path, capsys):
    assert (
        main(
            [
                "bench",
                "scale",
                "--ranks",
                "2",
                "--parameters",
                "1",
                "--directory",
                str(tmp_path),
                "--json",
                str(tmp_path / "scale.json"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "2 ranks: 7 files per checkpoint" in said
    assert "per second; launching process" in said
    assert json.loads((tmp_path / "scale.json").read_text())["worlds"][0]["ranks"] == 2
