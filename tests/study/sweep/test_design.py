"""Grids: shapes, counts, compute made equal, confounding refused, budgets kept, power against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from bst_dist.config import Recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.plan.flops import train_flops_per_token
from bst_dist.study.sweep import power
from bst_dist.study.sweep.config import ShapeConfig, SweepConfig
from bst_dist.study.sweep.confounding import ConfoundedError, require_sound
from bst_dist.study.sweep.design import Designer
from bst_dist.study.sweep.shape import count, places, solve

BASE = {
    "model": {"block": 32, "vocab_size": 300},
    "data": {"corpus": "none"},
    "train": {"sequence_length": 64, "sequences": 4, "precision": "fp32"},
}
SWEEP = {
    "name": "t",
    "recipe": "base.yaml",
    "architectures": {"sliding": {"model.mixer": "sliding"}, "bst": {"model.mixer": "bst"}},
    "baseline": "sliding",
    "sizes": [1e5, 2e5, 4e5],
    "depths": [2, 8],
    "tokens_per_parameter": [5, 10, 20],
    "seeds": [0, 1],
    "shape": {"head_width": 4, "tolerance": 0.25},
}


@pytest.fixture
def designer(tmp_path):
    def make(base=BASE, **changes):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        return Designer(parse(SweepConfig, {**SWEEP, **changes, "recipe": str(tmp_path / "base.yaml")}))

    return make


def runs_of(designer):
    return designer.runs(designer.cells())


def test_half_the_width_and_four_times_the_depth_is_the_same_size_where_only_matrices_count():
    base = {"mixer": "sliding", "block": 2, "vocab_size": 1}
    two = solve(base, ShapeConfig(head_width=64), 12 * 1024**2 * 2, 2, 64)
    eight = solve(base, ShapeConfig(head_width=64), 12 * 1024**2 * 2, 8, 64)
    assert (two.width, eight.width) == (1024, 512)


def test_no_other_width_is_nearer_to_the_size():
    base = {"mixer": "bst", "block": 32, "vocab_size": 300}
    found = solve(base, ShapeConfig(head_width=4), 2e5, 4, 64)
    sizes = [train_flops_per_token(solve_at(base, found, heads), 64) / 6 for heads in range(1, 40)]
    assert found.heads == 1 + int(np.argmin(np.abs(np.array(sizes) / 2e5 - 1)))


def solve_at(base, found, heads):
    width = 4 * heads
    return found.model_copy(update={"width": width, "heads": heads, "ffn": 4 * width})


def test_a_size_between_two_widths_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"no width of 8 layers comes near N = 3e\+05"):
        solve({"mixer": "sliding", "block": 32, "vocab_size": 300}, ShapeConfig(head_width=64), 3e5, 8, 64)


def test_counts_on_the_meta_device_are_those_of_the_built_model(designer):
    for run in runs_of(designer(sizes=[1e5], seeds=[0]))[::4]:
        built = LanguageModel(run.recipe.model)
        assert run.counts == count(run.recipe.model, 64)
        assert run.counts.total == sum(p.numel() for p in built.parameters())
        assert run.counts.non_embedding == run.counts.total - built.embedding.weight.numel()
        assert (run.counts.kernel > 0) == ("bst" in run.recipe.model.mixers())


@pytest.mark.parametrize(("depth", "fraction"), [(2, 0.5), (8, 0.5), (12, 0.25), (4, 1.0), (3, 1 / 3)])
def test_layers_under_study_are_as_many_as_asked_and_evenly_spread(depth, fraction):
    found = places(depth, fraction)
    assert len(found) == round(depth * fraction)
    assert np.ptp(np.diff(found)) <= 1 if len(found) > 2 else True
    assert np.mean(found) + 0.5 == pytest.approx(depth / 2, abs=0.5)


def test_every_architecture_and_depth_of_a_size_gets_the_same_compute_to_half_a_step(designer):
    for run in runs_of(designer()):
        if run.multiple is not None:
            step = 6 * run.counts.parameters * 4 * 64
            assert abs(run.flops - 6 * run.cell.size**2 * run.multiple) <= step / 2


def test_branches_leave_their_trunk_where_it_keeps_a_checkpoint_and_decay_from_there(designer):
    runs = {run.name: run for run in runs_of(designer())}
    branches = [run for run in runs.values() if run.trunk]
    assert branches
    for run in branches:
        trunk, schedule = runs[run.trunk].recipe, run.recipe.schedule
        assert run.recipe.branch.step in trunk.checkpoint.at
        assert run.recipe.branch.step <= trunk.train.steps
        assert (
            round(schedule.decay_fraction * run.recipe.train.steps) == run.recipe.train.steps - run.recipe.branch.step
        )
        assert trunk.schedule.decay_fraction == 0
        assert trunk.schedule.warmup_steps == schedule.warmup_steps < run.recipe.branch.step


def test_trunks_cost_less_than_a_run_for_each_length(designer):
    runs = runs_of(designer(tokens_per_parameter=[5, 10, 20, 40]))
    own = sum(run.own_flops for run in runs)
    whole = sum(run.flops for run in runs if run.multiple is not None)
    assert own / whole == pytest.approx(47 / 75, abs=0.01)


def test_names_follow_the_recipe_and_nothing_else(designer):
    names = [run.name for run in runs_of(designer())]
    assert len(set(names)) == len(names)
    assert names == [run.name for run in runs_of(designer())]
    changed = [run.name for run in runs_of(designer(base={**BASE, "optimizer": {"weight_decay": 0.2}}))]
    assert not set(names) & set(changed)
    assert all(isinstance(run.recipe, Recipe) for run in runs_of(designer()))


def test_rules_go_by_size_alone(designer):
    runs = runs_of(designer(rules={"rate_exponent": 0.5, "batch_exponent": 1.0}))
    rates = {run.cell.size: run.recipe.optimizer.learning_rate for run in runs}
    batches = {(run.cell.size, run.recipe.train.sequences) for run in runs}
    assert rates[1e5] / rates[4e5] == pytest.approx(2.0)
    assert batches == {(1e5, 4), (2e5, 8), (4e5, 16)}


def test_kernels_are_crossed_with_architectures_that_have_one(designer):
    found = designer(kernels={"s4d": {}, "none": {"model.ssm": {"kernel": "none"}}}).architectures
    assert list(found) == ["sliding", "bst+s4d", "bst+none"]


def test_the_audit_is_in_the_corners_at_the_shortest_length(designer):
    audit = [run for run in runs_of(designer(audit={"factors": [0.5, 2]})) if run.cell.role == "audit"]
    assert {(run.cell.size, run.cell.depth) for run in audit} == {(1e5, 2), (1e5, 8), (4e5, 2), (4e5, 8)}
    assert {run.multiple for run in audit} == {5}
    assert len(audit) == 4 * 2 * 2


def test_a_crossed_grid_is_sound(designer):
    require_sound(runs_of(designer()))


@pytest.mark.parametrize(
    ("changes", "base", "message"),
    [
        ({"only": [(1e5, 2), (2e5, 4), (4e5, 8)], "depths": [2, 4, 8]}, {}, "depth follows from size"),
        ({"depths": [2, 5]}, {}, "share of layers under study of bst drifts with depth"),
        ({}, {"train": {"sequence_length": 256, "sequences": 4}}, "receptive field of a window stack grows"),
        ({}, {"model": {**BASE["model"], "context": {"ssm_width": 8}}}, "context width / width of bst drifts"),
    ],
)
def test_a_confounded_grid_is_refused_with_the_columns(designer, changes, base, message):
    with pytest.raises(ConfoundedError, match=message):
        settings = {"architectures": {"bst": {"model.mixer": "bst"}}, "baseline": "bst"} if "model" in base else {}
        require_sound(runs_of(designer({**BASE, **base}, **changes, **settings)))


def test_one_arm_in_which_windows_see_everything_makes_the_grid_sound(designer):
    arms = {"long": {"train.sequence_length": 256}, "short": {"train.sequence_length": 64}}
    require_sound(runs_of(designer(arms=arms)))


def test_budget_drops_whole_blocks_until_it_is_kept_and_stays_sound(designer):
    made = designer(budget={"flops": 3e13})
    runs, sweep = runs_of(made), made.sweep
    spent, limit, unit = power.cost(sweep.budget, {})
    assert unit == "FLOPs"
    assert sum(map(spent, runs)) > limit
    fitted = power.fit_budget(runs, spent, limit, sweep.noise)
    assert fitted.spent <= limit
    assert {run.cell.block for run in fitted.runs}.isdisjoint(fitted.dropped)
    by_block = {}
    for run in fitted.runs:
        by_block.setdefault(run.cell.block, set()).add(run.cell.architecture)
    assert all(architectures == {"sliding", "bst"} for architectures in by_block.values())
    require_sound(fitted.runs)


def test_a_budget_that_pays_for_no_sound_grid_is_refused(designer):
    made = designer()
    spent, _, _ = power.cost(made.sweep.budget, {})
    with pytest.raises(UserError, match="the least grid that is not confounded costs"):
        power.fit_budget(runs_of(made), spent, 1e9, made.sweep.noise)


def test_time_needs_a_speed(designer):
    made = designer(budget={"cpu_minutes": 1})
    spent, _, _ = power.cost(made.sweep.budget, {})
    run = runs_of(made)[0]
    with pytest.raises(UserError, match=r"bst sweep plan --measure"):
        spent(run)
    spent, _, _ = power.cost(made.sweep.budget, {power.shape_key(run.cell): 1e9})
    assert spent(run) == pytest.approx((run.own_flops / 1e9 + 8) / 60)


def test_predicted_standard_errors_are_those_of_simulated_sweeps(designer):
    made = designer()
    runs = [run for run in runs_of(made) if run.multiple is not None and run.cell.architecture == "bst"]
    predicted = power.predict(runs_of(made), made.sweep.noise)
    matrix = np.stack([np.ones(len(runs)), *(v - v.mean() for v in power.design_columns(runs).values())], axis=1)
    block = np.array([run.cell.block for run in runs])
    names, number = np.unique(block, return_inverse=True)
    generator = np.random.default_rng(0)
    slopes = []
    for _ in range(600):
        level = generator.normal(0, math.sqrt(0.7), len(names))[number]
        noise = math.sqrt(2) * 0.007 * (level + generator.normal(0, math.sqrt(0.3), len(runs)))
        slopes.append(np.linalg.lstsq(matrix, noise, rcond=None)[0])
    spans = [np.ptp(values) for values in power.design_columns(runs).values()]
    simulated = np.std(slopes, axis=0)[1:] * spans
    assert simulated == pytest.approx([error for error, _ in predicted.changes.values()], rel=0.1)
