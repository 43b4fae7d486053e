"""The expected speed of a model shape on a device: `bst plan`'s time model with the settings of the run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from bst_base.errors import UserError
from bst_base.settings import parse
from bst_dist.plan.accelerators import accelerator
from bst_dist.plan.search import Planner
from bst_dist.plan.speed import Cluster
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.design import Designer
from bst_dist.study.sweep.price import shape_key
from bst_dist.study.sweep.speed import planned

H100 = accelerator("h100-80gb")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two sizes with two layers and two seeds, on four ranks."""
    path = tmp_path_factory.mktemp("speed") / "base.yaml"
    base = {
        "ranks": 4,
        "model": {"block": 32, "vocab_size": 300},
        "data": {"corpus": "none"},
        "deepspeed": "zero1",
        "train": {"sequence_length": 64, "sequences": 8, "micro_sequences": 1},
    }
    path.write_text(yaml.safe_dump(base))
    sweep = {
        "name": "t",
        "recipe": str(path),
        "architectures": {"sliding": {"model.mixer": "sliding"}},
        "baseline": "sliding",
        "sizes": [1e5, 1e8],
        "depths": [2],
        "tokens_per_parameter": [5],
        "seeds": [0, 1],
        "arms": {"near": {}},
        "shape": {"head_width": 4},
    }
    designer = Designer(parse(SweepConfig, sweep))
    return designer.runs(designer.cells())


def test_speed_of_a_shape_equals_that_of_the_plan(runs):
    told = []
    found = planned(runs, H100, 8, lambda key, rate: told.append(key))
    assert set(found) == {shape_key(run.cell) for run in runs}
    assert told == list(found)  # each shape once, in spite of two seeds
    run = next(run for run in runs if run.cell.size == 1e5)
    way = Planner(run.recipe, Cluster(1, 4, H100)).as_written()
    assert (way.work.slice.rows, way.work.strategy.stage, way.work.slice.sp, way.work.world) == (1, 1, 1, 4)
    flops_a_step = run.flops / run.recipe.train.steps
    assert found[shape_key(run.cell)] == pytest.approx(flops_a_step / way.speed.total / 4)


def test_kernel_launches_limit_the_speed_of_small_models_only(runs):
    small, large = (
        planned([run], H100, 8, lambda *_: None)[shape_key(run.cell)]
        for size in (1e5, 1e8)
        for run in [next(r for r in runs if r.cell.size == size)]
    )
    assert small < 0.01 * large < 0.01 * H100.bf16_tflops * 1e12


def test_runs_that_do_not_fit_in_memory_are_refused_by_name(runs):
    tiny = H100.model_copy(update={"memory_gb": 4.0})
    large = [run for run in runs if run.cell.size == 1e8]
    with pytest.raises(UserError, match=r"sliding-near-n1e08-d2-s0-.* does not fit: it needs .* GB more than .* has"):
        planned(large, tiny, 8, lambda *_: None)


def test_ranks_that_do_not_share_nodes_evenly_are_refused(runs):
    five = replace(runs[0], recipe=runs[0].recipe.model_copy(update={"ranks": 5}))
    with pytest.raises(UserError, match="5 ranks cannot be divided over 2 nodes of 3"):
        planned([five], H100, 3, lambda *_: None)
