"""The time in which the host launches kernels bounds the plan of a small model."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bst_base.settings import parse
from bst_dist.config import Recipe
from bst_dist.plan import search
from bst_dist.plan.accelerators import accelerator
from bst_dist.plan.kernel_launches import COMPILED_FEWER, LAUNCH_S, operations
from bst_dist.plan.memory.live import LiveBytes
from bst_dist.plan.memory.peak import memory
from bst_dist.plan.search import Choice, Planner
from bst_dist.plan.speed import Cluster
from tests.plan.test_search import SETTINGS

UNCOMPILED = parse(Recipe, SETTINGS | {"compile": False})


def test_views_and_allocations_launch_no_kernels():
    with FakeTensorMode(), LiveBytes() as live:
        x, weight = torch.empty(4, 6), torch.empty(6, 6, requires_grad=True)
        y = torch.relu((x.view(2, 2, 6).transpose(0, 1).flatten(0, 1) @ weight)[:2])  # a copy, a product, a ReLU
        assert live.launched == 3
        y.backward(torch.empty_like(y))
    assert live.launched == 3 + 3  # ReLU, slice, and one for the product, because x needs no gradient


def plan(recipe: Recipe, rows: int = 16, stage: int = 0, policy: str = "none"):
    planner = Planner(recipe, Cluster(1, 1, accelerator("h100-80gb")))
    return planner, planner.candidate(Choice(stage, 1, rows, policy))


def test_step_time_of_a_small_model_equals_its_launch_time():
    planner, way = plan(UNCOMPILED)
    layers, around = operations(planner.activations, planner.model.mixers(), way.work)
    assert way.speed.launches > way.speed.compute + way.speed.memory
    assert way.speed.total == pytest.approx(LAUNCH_S * (layers + around), rel=0.01)
    # the same operations on fewer rows: twice the micro-batches launch twice as much
    assert plan(planner.recipe, rows=8)[1].speed.total == pytest.approx(2 * way.speed.total, rel=0.01)


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_compiled_layers_launch_fewer_kernels(policy):
    planner, way = plan(parse(Recipe, SETTINGS), policy=policy)
    layers, around = operations(planner.activations, planner.model.mixers(), way.work)
    assert way.speed.total == pytest.approx(LAUNCH_S * (layers / COMPILED_FEWER + around), rel=0.01)


def test_plan_does_not_compile_what_a_run_does_not_compile():
    train = SETTINGS["train"] | {"carry": True}
    carried = SETTINGS | {"train": train, "data": {"corpus": "none", "mode": "streaming"}}
    planner, way = plan(parse(Recipe, carried))
    layers, around = operations(planner.activations, planner.model.mixers(), way.work)
    assert way.speed.total == pytest.approx(LAUNCH_S * (layers + around), rel=0.01)


@pytest.mark.parametrize(("policy", "compiled"), [("none", False), ("selective", True), ("every-layer", True)])
def test_zero3_gathers_compiled_layers_as_a_whole(policy, compiled, monkeypatch):
    monkeypatch.setattr(search, "memory", lambda sizes, *others: given.append(sizes) or memory(sizes, *others))
    given = []
    planner = Planner(parse(Recipe, SETTINGS), Cluster(1, 2, accelerator("h100-80gb")))
    way = planner.candidate(Choice(3, 1, 8, policy))
    assert given == [planner.sizes.by_layer if compiled else planner.sizes]
    layers, around = operations(planner.activations, planner.model.mixers(), way.work)
    fewer = COMPILED_FEWER if compiled else 1  # some of it overlaps with the computation
    assert way.speed.launches == pytest.approx(LAUNCH_S * (layers / fewer + around), rel=0.05)


def test_recomputed_layer_launches_its_forward_pass_twice():
    planner, way = plan(UNCOMPILED, rows=1)
    again = planner.candidate(Choice(0, 1, 1, "every-layer"))
    layers, rerun = (operations(planner.activations, planner.model.mixers(), one.work)[0] for one in (way, again))
    assert 1.2 * layers < rerun < 1.6 * layers


def test_launches_of_a_large_model_overlap_with_computation():
    model = SETTINGS["model"] | {"width": 2048, "heads": 16, "ffn": 8192, "block": 512}
    train = {"steps": 1, "sequence_length": 4096, "sequences": 16}
    _, way = plan(parse(Recipe, SETTINGS | {"model": model, "train": train}), rows=8)
    assert way.speed.launches == 0
