"""Host memory in a plan, compared with what a run on two ranks reserves for checkpoints and local copies."""

from __future__ import annotations

import pytest
from torch import nn

from bst_dist.checkpoint.host_copy import HostCopy
from bst_dist.checkpoint.local.writing import CopyWriter
from bst_dist.parallel.ranks import Ranks
from bst_dist.plan.accelerators import accelerator
from bst_dist.plan.host import host_at_start, host_memory
from bst_dist.plan.search import Planner
from bst_dist.plan.speed import Cluster
from bst_dist.train import building
from bst_dist.train.engine import Engine
from bst_dist.train.run import train
from bst_dist.train.start.request import Request, load, resolve

WORLD = 2
PADDING = 0.02
"""ZeRO gives every rank an equal share, padded at the end of each group of parameters."""


def planner_of(request: Request, nodes: int = 1) -> Planner:
    recipe = resolve(load(request), request, WORLD).recipe  # with the vocabulary of the corpus
    return Planner(recipe, Cluster(nodes, WORLD // nodes, accelerator("h100-80gb")))


def planned(request: Request, nodes: int = 1) -> dict[str, float]:
    planner = planner_of(request, nodes)
    return host_memory(planner, planner.as_written())


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_planned_host_memory_equals_that_of_a_run(recipe_file, tmp_path, on_ranks, monkeypatch, stage):
    average = ["train.average.decay=0.9"] if stage == 1 else []
    changes = [
        f"deepspeed=ds_configs/zero{stage}.json",
        "checkpoint.local_every=1",
        f"checkpoint.local_directory={tmp_path / 'local'}",
        *average,
    ]
    request = Request(recipe_file(), changes, tmp_path / "run", False, 2)
    found = planned(request)
    pinned: dict[int, int] = {}
    files: list[int] = []
    reserve, opened = HostCopy.reserve, CopyWriter.__init__

    def reserving(self: HostCopy, count: int) -> None:
        pinned[id(self)] = max(pinned.get(id(self), 0), 4 * count)
        reserve(self, count)

    def opening(self: CopyWriter, *given: object) -> None:
        opened(self, *given)
        files.append(self.needed)

    monkeypatch.setattr(HostCopy, "reserve", reserving)
    monkeypatch.setattr(CopyWriter, "__init__", opening)

    def run(ranks: Ranks) -> tuple[int, int]:
        train(request, ranks)
        assert len(pinned) == 2  # of checkpoints, and of local copies
        return sum(pinned.values()), files[0]

    reserved = on_ranks(WORLD, run)
    assert found["activations"] == 0
    taken = sum(own for own, _ in reserved) + reserved[0][1]  # the files of a node are those of both ranks
    assert WORLD * sum(found.values()) == pytest.approx(taken, rel=PADDING)


def test_planned_host_memory_counts_neighbour_copies_and_no_disabled_features(recipe_file, tmp_path):
    def of(*changes: str, nodes: int = 1) -> dict[str, float]:
        return planned(Request(recipe_file(), list(changes), tmp_path / "run", False, None), nodes)

    assert set(of("checkpoint.background=false").values()) == {0}
    alone, beside = (of("checkpoint.local_every=1", nodes=nodes) for nodes in (1, 2))
    assert alone["checkpoint copy"] == beside["checkpoint copy"] > 0
    assert beside["local copies"] / alone["local copies"] == 7 / 4  # one copy in pinned memory, three or six in files


@pytest.mark.ranks
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_each_rank_builds_the_whole_model_in_host_memory_at_the_start(
    recipe_file, tmp_path, on_ranks, monkeypatch, stage
):
    request = Request(recipe_file(), [f"deepspeed=ds_configs/zero{stage}.json"], tmp_path / "run", False, 1)
    expected, built = host_at_start(planner_of(request)), []

    def engine(model: nn.Module, *others: object) -> Engine:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        assert {storage.device.type for storage in storages.values()} == {"cpu"}
        built.append(sum(storage.nbytes() for storage in storages.values()))
        return Engine(model, *others)

    monkeypatch.setattr(building, "Engine", engine)

    def run(ranks: Ranks) -> list[int]:
        train(request, ranks)
        return built

    assert on_ranks(WORLD, run) == [[expected]] * WORLD
