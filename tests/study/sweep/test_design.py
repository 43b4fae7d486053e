"""Sweep designs: equal sizes and compute, counts, refusal of unsound designs, budgets, errors against simulation."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from bst_base.errors import UserError
from bst_base.settings import ConfigError, parse
from bst_dist.cli import main
from bst_dist.config import Recipe
from bst_dist.model.lm import LanguageModel
from bst_dist.study.laws.power import Power
from bst_dist.study.laws.verdict import columns
from bst_dist.study.sweep import price, rehearsal, shape
from bst_dist.study.sweep.commands.design import show_power
from bst_dist.study.sweep.config import ShapeConfig, SweepConfig
from bst_dist.study.sweep.design import Designer
from bst_dist.study.sweep.rehearsal import RehearsalError, rehearse
from bst_dist.study.sweep.shape import count, places, solve_together
from bst_dist.study.sweep.soundness import UnsoundError, planned_gaps, require_sound

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
    "tokens_per_parameter": [5, 20],
    "seeds": [0, 1],
    "arms": {"near": {}, "far": {"model.block": 8, "train": {"sequence_length": 256, "sequences": 1}}},
    "shape": {"head_width": 4},
}


@pytest.fixture(scope="module")
def designer(tmp_path_factory):
    """Function that makes designers; they are cached by settings, so that runs are designed once."""
    path, made = tmp_path_factory.mktemp("design") / "base.yaml", {}

    def make(base=BASE, **changes):
        key = yaml.safe_dump([base, changes])
        if key not in made:
            path.write_text(yaml.safe_dump(base))
            made[key] = Designer(parse(SweepConfig, {**SWEEP, **changes, "recipe": str(path)}))
        return made[key]

    return make


RUNS = {}


def runs_of(designer):
    if id(designer) not in RUNS:
        RUNS[id(designer)] = designer.runs(designer.cells())
    return RUNS[id(designer)]


def sound(runs, arm="near"):
    require_sound(runs, "sliding", arm)


def sizes_of(runs):
    """Return N by (arm, size, depth) and architecture."""
    found = {}
    for run in runs:
        cell = run.cell
        found.setdefault((cell.arm, cell.size, cell.depth), {})[cell.architecture] = run.counts.parameters
    return found


def test_half_width_and_four_times_depth_give_equal_size():
    bases = {"sliding": ({"mixer": "sliding", "block": 2, "vocab_size": 2}, 64)}
    found = [solve_together(bases, ShapeConfig(head_width=64), 12 * 1024**2 * 2, depth)["sliding"] for depth in (2, 8)]
    assert [model.width for model in found] == [1024, 512]
    assert [model.ffn / model.width for model in found] == pytest.approx([4, 4], rel=0.04)


def test_compared_models_have_equal_sizes_within_one_percent(designer):
    """With widths in steps of one head only, sizes would differ by 10 % and more at these depths."""
    found = sizes_of(runs_of(designer()))
    assert len(found) == 2 * 3 * 2
    for (_, size, _), by_architecture in found.items():
        n = list(by_architecture.values())
        assert max(n) / min(n) - 1 < 0.0102
        assert n[0] == pytest.approx(size, rel=shape.OFF + 0.01)


def test_ffns_are_multiples_of_eight_and_near_their_ratio(designer):
    for run in runs_of(designer()):
        model = run.recipe.model
        assert model.ffn % 8 == 0
        assert 1 / shape.RATIO <= model.ffn / model.width / 4 <= shape.RATIO


def test_gated_ffn_has_two_thirds_of_the_width_at_equal_size():
    base = {"mixer": "sliding", "block": 32, "vocab_size": 300}
    bases = {"relu": (base, 64), "swiglu": (base | {"activation": "swiglu"}, 64)}
    found = solve_together(bases, ShapeConfig(head_width=32), 1e6, 4)
    models = {name: LanguageModel(m.config(bases[name][0], ShapeConfig(head_width=32), 4)) for name, m in found.items()}
    sizes = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert found["swiglu"].width == found["relu"].width
    assert found["swiglu"].ffn == pytest.approx(found["relu"].ffn * 2 / 3, abs=8)


def test_size_without_common_shapes_is_refused():
    bases = {"sliding": ({"mixer": "sliding", "block": 32, "vocab_size": 300}, 64)}
    with pytest.raises(ConfigError, match=r"no shapes of 8 layers have equal size near N = 1e\+05"):
        solve_together(bases, ShapeConfig(head_width=64), 1e5, 8)


def test_completep_base_has_the_smallest_width_and_depth(designer):
    made = designer(rules={"parametrisation": "completep"})
    base = made.base["model"]["parametrisation"]
    widths = [run.recipe.model.width for run in runs_of(made) if run.cell.architecture == "sliding"]
    assert (base["base_width"], base["base_depth"]) == (min(widths), 2)


def test_parameter_counts_equal_those_of_the_built_model(designer):
    for run in runs_of(designer(sizes=[1e5], seeds=[0]))[::4]:
        built = LanguageModel(run.recipe.model)
        assert run.counts == count(run.recipe.model, run.recipe.train.sequence_length)
        assert run.counts.total == sum(p.numel() for p in built.parameters())
        assert run.counts.non_embedding == run.counts.total - built.embedding.weight.numel()
        assert (run.counts.kernel > 0) == ("bst" in run.recipe.model.mixers())


@pytest.mark.parametrize(("depth", "fraction"), [(2, 0.5), (8, 0.5), (12, 0.25), (4, 1.0), (3, 1 / 3)])
def test_studied_layers_have_the_requested_number_and_are_evenly_spaced(depth, fraction):
    found = places(depth, fraction)
    assert len(found) == round(depth * fraction)
    assert np.ptp(np.diff(found)) <= 1 if len(found) > 2 else True
    assert np.mean(found) + 0.5 == pytest.approx(depth / 2, abs=0.5)


def test_runs_of_one_size_get_equal_compute_within_half_a_step(designer):
    for run in runs_of(designer()):
        if run.multiple is not None:
            train = run.recipe.train
            step = 6 * run.counts.parameters * train.sequences * train.sequence_length
            assert abs(run.flops - 6 * run.cell.size**2 * run.multiple) <= step / 2


def test_branches_start_at_a_trunk_checkpoint_and_then_decay(designer):
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


def test_shared_trunks_cost_less_than_separate_runs(designer):
    runs = runs_of(designer(tokens_per_parameter=[5, 10, 20, 40]))
    own = sum(run.own_flops for run in runs)
    whole = sum(run.flops for run in runs if run.multiple is not None)
    assert own / whole == pytest.approx(47 / 75, abs=0.01)


def test_lengths_that_round_to_the_same_steps_are_refused(designer):
    """Their two runs would be one point of the curve, between which nothing can be interpolated."""
    with pytest.raises(
        ConfigError, match=r"two values of tokens_per_parameter give the same number of steps \(5: \d+, "
    ):
        runs_of(designer(tokens_per_parameter=[5, 5.001]))


def test_run_names_depend_only_on_the_recipe(designer):
    made = designer()
    names = [run.name for run in runs_of(made)]
    assert len(set(names)) == len(names)
    assert names == [run.name for run in made.runs(made.cells())]
    changed = [run.name for run in runs_of(designer(base={**BASE, "optimizer": {"weight_decay": 0.2}}))]
    assert not set(names) & set(changed)
    assert all(isinstance(run.recipe, Recipe) for run in runs_of(designer()))


def test_rate_and_batch_rules_depend_only_on_size(designer):
    runs = runs_of(designer(rules={"rate_exponent": 0.5, "batch_exponent": 1.0}))
    rates = {run.cell.size: run.recipe.optimizer.learning_rate for run in runs}
    batches = {(run.cell.size, run.recipe.train.sequences) for run in runs if run.cell.arm == "near"}
    assert rates[1e5] / rates[4e5] == pytest.approx(2.0)
    assert batches == {(1e5, 4), (2e5, 8), (4e5, 16)}


def test_kernels_are_combined_with_architectures_that_have_a_kernel(designer):
    found = designer(kernels={"s4d": {}, "none": {"model.ssm": {"kernel": "none"}}}).architectures
    assert list(found) == ["sliding", "bst+s4d", "bst+none"]


def test_audit_runs_are_at_the_corners_and_the_shortest_length(designer):
    audit = [run for run in runs_of(designer(audit={"factors": [0.5, 2]})) if run.cell.role == "audit"]
    assert {(run.cell.size, run.cell.depth) for run in audit} == {(1e5, 2), (1e5, 8), (4e5, 2), (4e5, 8)}
    assert {run.multiple for run in audit} == {5}
    assert {run.cell.seed for run in audit} == {0, 1}
    assert len(audit) == 4 * 2 * 2 * 2 * 2  # corners, architectures, arms, seeds, factors


def test_larger_batches_are_multiples_of_the_number_of_ranks(designer):
    """By the rule alone, 8 ranks would share 11, 16 and 23 sequences; then some ranks would compute masked rows."""
    base = {**BASE, "ranks": 8, "train": {**BASE["train"], "sequences": 16, "micro_sequences": 2}}
    far = {"model.block": 8, "train": {"sequence_length": 256, "sequences": 8}}
    runs = runs_of(designer(base, rules={"batch_exponent": 0.5}, arms={"near": {}, "far": far}))
    found = {(run.cell.arm, run.cell.size): run.recipe.train.sequences for run in runs}
    assert found == {
        ("near", 1e5): 16,
        ("near", 2e5): 24,
        ("near", 4e5): 32,
        ("far", 1e5): 8,
        ("far", 2e5): 8,
        ("far", 4e5): 16,
    }
    assert {run.recipe.train.micro_sequences for run in runs} == {2}


def test_audit_can_be_limited_to_some_arms(designer):
    audit = [run for run in runs_of(designer(audit={"factors": [0.5, 2], "arms": ["far"]})) if run.cell.role == "audit"]
    assert {run.cell.arm for run in audit} == {"far"}
    assert len(audit) == 4 * 2 * 2 * 2
    with pytest.raises(ConfigError, match=r"audit\.arms: 'fra' is not among the arms near, far"):
        designer(audit={"factors": [0.5, 2], "arms": ["fra"]})


def test_order_cheapest_runs_the_cheapest_blocks_first(designer):
    def order(**changes):
        runs = runs_of(designer(**changes))
        return list(dict.fromkeys((run.cell.size, run.cell.depth) for run in runs)), {run.name for run in runs}

    cheapest, names = order(order="cheapest")
    assert cheapest == [(size, depth) for size in (1e5, 2e5, 4e5) for depth in (2, 8)]
    largest, same = order()
    assert largest == cheapest[::-1]
    assert names == same  # the runs are the same, so trained ones are kept


def test_an_audit_of_one_seed_is_refused(designer):
    with pytest.raises(ConfigError, match="the audit needs 2 seeds"):
        designer(audit={"factors": [0.5, 2]}, seeds=[0])


def test_crossed_grid_is_valid_and_can_be_analysed(designer):
    made = designer()
    runs = runs_of(made)
    sound(runs)
    rehearse(made.sweep, runs)


def without_losses(monkeypatch, lost):
    """Make the simulation give a loss of NaN for some rows."""
    simulate = rehearsal.simulate

    def rows(*arguments):
        return [row.model_copy(update={"loss_nats": math.nan}) if lost(row) else row for row in simulate(*arguments)]

    monkeypatch.setattr(rehearsal, "simulate", rows)


@pytest.mark.parametrize("lost", ["bst", "sliding"])
def test_analysis_without_losses_of_one_architecture_gives_one_message(designer, monkeypatch, lost):
    made = designer()
    without_losses(monkeypatch, lambda row: row.architecture == lost)
    with pytest.raises(RehearsalError, match="no verdict could be given:\n  bst: no pair of bst and"):
        rehearse(made.sweep, runs_of(made))


def test_analysis_works_if_single_runs_have_no_loss(designer, monkeypatch):
    made = designer()
    names = [run.name for run in runs_of(made) if run.multiple is not None]
    without_losses(monkeypatch, lambda row: row.run in (names[0], names[-1]))
    rehearse(made.sweep, runs_of(made))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_parameter": [5]}, "tokens_per_parameter has one value"),
        ({"sizes": [2e5]}, "sizes has one value"),
        ({"seeds": [0], "sizes": [1e5, 2e5]}, "4 independent runs are too few for 4 coefficients"),
        ({"architectures": {name: {"model.mixer": "sliding"} for name in ("sliding", "twin")}}, "are the same recipe"),
        ({"noise": {"seed": math.inf}}, "noise.seed: input should be less than or equal to 1 (got inf)"),
        ({"noise": {"seed": math.nan}}, "noise.seed: input should be less than or equal to 1 (got nan)"),
    ],
)
def test_design_that_cannot_be_analysed_gives_one_message(tmp_path, capsys, changes, message):
    """As a user sees it: the command fails with the reason and creates nothing."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    sweep = {**SWEEP, **changes, "directory": str(tmp_path / "runs")}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert main(["sweep", "design", str(tmp_path / "sweep.yaml")]) == 2
    told = capsys.readouterr().err
    assert told.count("bst sweep design: ") == 1
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "runs").exists()


FAR = {"model.block": 8, "train": {"sequence_length": 256, "sequences": 1}}


@pytest.mark.parametrize(
    ("changes", "base", "message"),
    [
        ({"only": [(1e5, 2), (2e5, 4), (4e5, 8)], "depths": [2, 4, 8]}, {}, "depth follows from size"),
        ({"depths": [2, 5]}, {}, "share of layers under study of bst drifts with depth"),
        ({"arms": {"near": FAR, "far": FAR}}, {}, "receptive field of a window stack grows with depth in every arm"),
        ({"arms": {"near": {}}}, {}, "sees more than a quarter of the sequence"),
        ({}, {"model": {**BASE["model"], "context": {"ssm_width": 8}}}, "context width / width of bst drifts"),
        ({"tokens_per_parameter": [5]}, {}, "tokens_per_parameter has one value"),
        ({"sizes": [2e5]}, {}, "sizes has one value"),
        ({"sizes": [1e5, 2e5], "seeds": [0]}, {}, "4 independent runs are too few for 4 coefficients"),
    ],
)
def test_unsound_grid_is_refused_with_the_reason(designer, changes, base, message):
    with pytest.raises(UnsoundError, match=message):
        sound(runs_of(designer({**BASE, **base}, **changes)))


def test_an_architecture_compared_with_itself_is_refused(designer):
    twins = {"sliding": {"model.mixer": "sliding"}, "twin": {"model.mixer": "sliding"}}
    with pytest.raises(ConfigError, match="architectures sliding and twin are the same recipe"):
        sound(runs_of(designer(architectures=twins)))


def test_size_differences_that_depend_on_depth_are_refused(designer):
    runs = [
        replace(run, counts=replace(run.counts, parameters=run.counts.parameters * 1.17))
        if (run.cell.architecture, run.cell.depth) == ("bst", 8)
        else run
        for run in runs_of(designer())
    ]
    with pytest.raises(UnsoundError, match=r"N of bst / N of sliding, changes by \+15.*% between .* the largest depth"):
        sound(runs)


def test_constant_size_differences_are_accepted(designer):
    runs = [
        replace(run, counts=replace(run.counts, parameters=run.counts.parameters * 1.17))
        if run.cell.architecture == "bst"
        else run
        for run in runs_of(designer())
    ]
    sound(runs)


def test_budget_removes_whole_blocks_and_keeps_the_design_sound(designer):
    made = designer(budget={"flops": 1.5e14})
    runs, sweep = runs_of(made), made.sweep
    spent, limit, unit = price.cost(sweep.budget, {})
    assert unit == "FLOPs"
    assert sum(map(spent, runs)) > limit
    fitted = price.fit_budget(runs, spent, limit, sweep.noise, "sliding", "near")
    assert fitted.spent <= limit
    assert {run.cell.stratum for run in fitted.runs}.isdisjoint(fitted.dropped)
    by_stratum = {}
    for run in fitted.runs:
        by_stratum.setdefault(run.cell.stratum, set()).add(run.cell.architecture)
    assert all(architectures == {"sliding", "bst"} for architectures in by_stratum.values())
    sound(fitted.runs)


def test_budget_leaves_no_change_that_rests_on_one_pair(designer):
    """With 1.2e14 FLOPs one pair of the larger size was left, which alone determined the changes over both factors."""
    made = designer()
    spent, _, _ = price.cost(made.sweep.budget, {})
    with pytest.raises(UserError, match=r"the smallest grid that can answer costs 1.39e\+14"):
        price.fit_budget(runs_of(made), spent, 1.2e14, made.sweep.noise, "sliding", "near")


def test_budget_too_small_for_a_sound_grid_is_refused(designer):
    made = designer()
    spent, _, _ = price.cost(made.sweep.budget, {})
    with pytest.raises(UserError, match=r"the smallest grid that can answer costs .* the budget is 1e\+09 FLOPs"):
        price.fit_budget(runs_of(made), spent, 1e9, made.sweep.noise, "sliding", "near")


def test_time_budget_needs_a_measured_speed(designer):
    made = designer(budget={"cpu_minutes": 1})
    spent, _, _ = price.cost(made.sweep.budget, {})
    run = runs_of(made)[0]
    with pytest.raises(UserError, match=r"bst sweep plan --measure"):
        spent(run)
    spent, _, _ = price.cost(made.sweep.budget, {price.shape_key(run.cell): 1e9})
    assert spent(run) == pytest.approx((run.own_flops / 1e9 + 8) / 60)


def test_startup_time_is_charged_for_every_device(designer):
    made = designer(base={**BASE, "ranks": 8}, budget={"gpu_hours": 1, "flops_per_s": 1e12, "start_s": 120})
    spent, _, unit = price.cost(made.sweep.budget, {})
    run = runs_of(made)[0]
    assert unit == "GPU-hours"
    assert spent(run) == pytest.approx((run.own_flops / 1e12 + 8 * 120) / 3600)


def test_predicted_standard_errors_equal_those_of_simulated_sweeps(designer):
    made = designer()
    predicted = price.standard_errors(runs_of(made), made.sweep.noise, "sliding", "near")
    gaps = planned_gaps(runs_of(made), "sliding", "near")[0]
    matrix, names = columns(gaps)
    strata, number = np.unique(gaps.stratum, return_inverse=True)
    generator = np.random.default_rng(0)
    slopes = []
    for _ in range(3000):
        level = generator.normal(0, math.sqrt(0.7), len(strata))[number]
        noise = math.sqrt(2) * 0.007 * (level + generator.normal(0, math.sqrt(0.3), len(gaps)))
        slopes.append(np.linalg.lstsq(matrix, noise, rcond=None)[0])
    simulated = dict(zip(names, np.std(slopes, axis=0)[1:], strict=True))
    assert predicted["depth"] == pytest.approx(simulated["depth"] * np.log(2), rel=0.1)
    assert predicted["flops"] == pytest.approx(simulated["flops"] * np.log(10), rel=0.1)


def test_the_reported_power_keeps_its_keys():
    """Scripts read them from the file of --json."""
    found = Power("depth", 12, 0.004, 0.4, math.inf, 0.2, 0.03)
    sweep = SimpleNamespace(noise=SimpleNamespace(seed=0.002), arm="near")
    plan = SimpleNamespace(sweep=sweep, power=lambda: [found], pairs_needed=lambda every: {"depth": 40})
    assert show_power(plan) == {
        "power": [
            {
                "factor": "depth",
                "pairs": 12,
                "standard_error": 0.004,
                "at_margin": 0.4,
                "smallest_seen": None,
                "equivalent": 0.2,
                "false": 0.03,
            }
        ],
        "pairs_needed": {"depth": 40},
    }
