"""Runs that did not finish: they count in Holm's correction, are named, and their pairs are left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from bst_base.errors import UserError
from bst_base.terminal import Sheet
from bst_dist.study.laws import gap
from bst_dist.study.laws.advantage import Advantage, compare
from bst_dist.study.laws.audit import audit
from bst_dist.study.laws.power import Noise, detectable_in_standard_errors, pairs_needed, predict
from bst_dist.study.report import advantage
from bst_dist.study.report.figures import gap_figure


def lost(observed, of, status="diverged", reason="the loss is nan"):
    """Return the same runs, of which those that `of` selects have this status and no loss."""
    return [replace(o, status=status, reason=reason, loss=float("nan"), by_block=()) if of(o) else o for o in observed]


def holm(raw, tests):
    """Holm's correction of `raw`, the smallest p values of `tests` (1979, written out)."""
    found, highest = {}, 0.0
    for place, (key, p) in enumerate(sorted(raw.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (tests - place) * p))
        found[key] = highest
    return found


@pytest.fixture
def pair_and_lost(study):
    """A study of two variants with positions, without and with the runs of mega, all of which diverged."""
    observed = [
        replace(o, by_block=(o.loss,) * 10)
        for o in study(9, per_depth=0.01, noise=0.006, seeds=2, variants=("bst", "mega"))
    ]
    return [o for o in observed if o.architecture != "mega"], lost(observed, lambda o: o.architecture == "mega")


def test_variant_whose_runs_all_diverged_counts_in_the_correction(pair_and_lost):
    alone, beside = (compare(observed, "sliding", "all") for observed in pair_and_lost)
    for found, tests in ((alone, 2), (beside, 4)):
        changes = found.variants["bst"].changes
        raw = {c.factor: max(c.p_robust, c.p_permutation) for c in changes}
        assert {c.factor: c.p_difference for c in changes} == pytest.approx(holm(raw, tests))
    assert [answer_over_depth(found) for found in (alone, beside)] == ["grows", "undecided"]
    assert beside.missing["mega"] == "no pair of mega and sliding has finished in arm all: of its runs 36 diverged"
    assert any(line.startswith("mega is not judged: no pair") for line in items(advantage.answer(beside)))


def test_variant_without_a_pair_counts_in_the_verdicts_by_position(pair_and_lost):
    found = [compare(observed, "sliding", "all").variants["bst"].zones for observed in pair_and_lost]
    assert [{zone.answer for zone in zones} for zones in found] == [{"grows"}, {"undecided"}]


def test_needed_pairs_count_the_variants_without_a_pair(pair_and_lost):
    """Twice as many tests need a larger change, in standard errors."""
    gaps = gap.pair(pair_and_lost[0], "bst", "sliding", "all")
    alone, beside = (detectable_in_standard_errors([gaps], absent=absent)["depth"] for absent in (0, 3))
    assert beside > 1.05 * alone


def answer_over_depth(found):
    return next(c.answer for c in found.variants["bst"].changes if c.factor == "depth")


def items(blocks):
    return [line for block in blocks for line in getattr(block, "lines", ())]


def test_diverged_and_failed_runs_are_named_and_their_pairs_left_out(study):
    observed = lost(study(0), lambda o: o.architecture == "bst" and o.seed == 0 and o.depth == 8)
    observed = lost(observed, lambda o: o.name == "sliding all 100000 2-s1 10.0", "failed", "a node was lost")
    observed = lost(observed, lambda o: o.architecture == "bst" and o.seed == 3 and o.depth == 2, "waiting", "")
    observed = lost(observed, lambda o: o.name == "sliding all 400000 8-s2 20.0", "running", "")
    found = gap.pair(observed, "bst", "sliding", "all")
    assert len(found) == 3 * 2 * 4 * 3 - 9 - 1 - 9 - 1
    assert "bst all 100000 8-s0 5.0: diverged: the loss is nan" in found.left_out
    assert sum("diverged" in line for line in found.left_out) == 9
    # The baseline's curve has longer and shorter runs there, but the pair is left out and not interpolated.
    not_done = "the run of sliding in the same stratum is not done"
    assert f"bst all 100000 2-s1 10.0: {not_done} (failed): a node was lost" in found.left_out
    assert "9 runs of bst: waiting" in found.left_out
    assert f"1 run of bst: {not_done} (running)" in found.left_out
    assert len(found.left_out) == 9 + 1 + 2


def test_message_of_a_comparison_without_pairs_counts_the_reasons(study):
    observed = lost(study(0, seeds=2), lambda o: o.architecture == "bst" and o.seed == 0, "failed", "x")
    observed = lost(observed, lambda o: o.architecture == "bst" and o.seed == 1, "waiting", "")
    with pytest.raises(UserError, match=r"in arm all: of its runs 18 failed, 18 waiting: run more of the sweep"):
        gap.pair(observed, "bst", "sliding", "all")


@pytest.mark.parametrize("axis", ["flops", "time_s"])
def test_comparison_before_any_run_is_done_names_every_variant(study, axis):
    found = compare(lost(study(0), bool, "waiting", ""), "sliding", "all", axis)
    assert found.variants == {}
    assert "of its runs 72 waiting: run more of the sweep" in found.missing["bst"]
    assert compare([], "sliding", "all", axis).missing == {}


def test_unfinished_runs_do_not_change_whether_the_machine_was_quiet(study):
    rows = [replace(o, step_time_excess=0.01) for o in study(3, noise=0.001)]
    rows = [
        replace(o, step_time_excess=np.nan) if o.status != "done" else o
        for o in lost(rows, lambda o: o.name == "bst all 100000 2-s0 5.0")
    ]
    assert compare(rows, "sliding", "all", "time_s").variants["bst"].changes


def test_pairs_trained_on_other_text_are_left_out(study):
    def on(o):
        other = o.architecture == "bst" and o.seed == 0
        return replace(o, corpora="" if o.seed == 2 and other else "b" * 64 if other else "a" * 64)

    observed = [replace(o, by_block=(o.loss,)) for o in map(on, study(0))]
    found = gap.pair(observed, "bst", "sliding", "all")
    assert len(found) == 3 * 2 * 3 * 3
    assert found.left_out[0].endswith(": trained on other text than the run of sliding")
    assert len(found.left_out) == 3 * 2 * 3
    assert not {block for block in gap.gaps_by(observed, "bst", "sliding", "all", "by_block")[1] if "s0" in block}
    unknown = [replace(o, corpora="") if o.architecture == "sliding" else o for o in observed]  # older results
    assert len(gap.pair(unknown, "bst", "sliding", "all")) == 3 * 2 * 4 * 3


def test_intervals_by_position_have_their_nominal_coverage(study):
    """Lengths of one trunk share its noise, so they are one observation and not three."""
    hits = tried = 0
    for seed in range(80):
        found = compare(study(seed, mean=0.0, noise=0.01, seeds=2), "sliding", "all").variants["bst"].by_block
        hits += sum(e.low <= 0 <= e.high for e in found[:1])
        tried += 1
        assert found[0].degrees == 3 * 2 * 2 - 1  # pairs - 1
    assert hits / tried > 0.88  # 95 % +- 2.4 %; with independent lengths about 75 %


def test_confounded_variant_beside_an_undecided_one_gives_a_number_of_pairs(study):
    def parameters(name, depth, size):
        return size * (1.1 if (name, depth) == ("mega", 8) else 1)

    found = compare(study(5, noise=0.02, variants=("mega", "bst"), parameters=parameters), "sliding", "all")
    answers = {c.factor: c.answer for c in found.variants["mega"].changes}
    assert answers["depth"] == "confounded"
    assert next(c for c in found.variants["bst"].changes if c.factor == "depth").answer == "undecided"
    assert 0 < found.variants["bst"].more_pairs["depth"] < 10_000


def test_change_that_no_number_of_pairs_shows_is_said(study):
    assert pairs_needed(12, 0.01, float("inf")) is None
    found = compare(study(11, noise=0.03), "sliding", "all").variants["bst"]
    change = next(c for c in found.changes if c.factor == "depth")
    hopeless = Advantage(**{**vars(found), "more_pairs": {"depth": None}})
    assert advantage.sentence(change, hopeless).endswith("undecided, and no number of pairs would show it.")


def test_confounded_verdict_from_few_pairs_has_no_correction(study):
    def parameters(name, depth, size):
        return size * (1.1 if (name, depth) == ("bst", 8) else 1)

    found = compare(study(5, noise=0.005, seeds=1, parameters=parameters), "sliding", "all").variants["bst"]
    change = next(c for c in found.changes if c.factor == "depth")
    assert (change.pairs, change.answer, found.adjusted) == (6, "confounded", {})
    assert advantage.sentence(change, found).endswith(" There are too few pairs to correct for the sizes.")


def test_corner_whose_other_rates_all_failed_is_undecided(observation):
    rows = [
        observation(name, 1e5, 8, seed, 5.0, 3.0 + 0.01 * abs(np.log(f)) + 0.001 * seed, rate_factor=f)
        for name in ("sliding", "bst")
        for seed in (0, 1)
        for f in (0.5, 1.0, 2.0)
    ]
    found = audit(lost(rows, lambda o: o.architecture == "bst" and o.rate_factor != 1, "failed"))
    answers = {corner.architecture: (corner.answer, corner.why) for corner in found}
    assert answers["bst"] == ("undecided", "failed at 0.5, 2 times the rule's rate")
    assert answers["sliding"] == ("passed", "")
    (nothing,) = audit(lost([o for o in rows if o.architecture == "bst"], bool, "failed"))
    assert (nothing.answer, nothing.losses) == ("undecided", {})


@pytest.fixture
def lone_pair(study):
    """A study of two arms and a held-out size, in which one pair of the largest depth has finished in arm all."""
    observed = study(3, seeds=2, held_out=(1e6,)) + study(4, seeds=2, arm="far")
    observed = [replace(o, by_block=(o.loss,) * 10) for o in observed]
    return lost(
        observed, lambda o: o.arm == "all" and o.depth == 8 and not o.held_out and not o.stratum.endswith("200000 8-s1")
    )


def test_change_that_rests_on_one_pair_has_no_verdict(lone_pair):
    found = compare(lone_pair, "sliding", "all")
    one = found.variants["bst"]
    assert [change.factor for change in one.changes] == ["flops"]
    assert found.missing == {"bst": "the change over depth rests on one pair of runs: all 200000 8-s1"}
    assert f"bst is only partly judged: {found.missing['bst']}" in items(advantage.answer(found))
    (flops,) = one.changes
    assert flops.p_difference == min(1, 2 * max(flops.p_robust, flops.p_permutation))  # depth counts as a test
    assert one.interaction is None
    assert one.crossing is None  # it is at the mean depth
    assert {(zone.arm, zone.change is None, zone.answer) for zone in one.zones} == {
        ("all", True, None),
        ("far", False, None),
    }
    assert set(one.contrasts["far"]) == {"mean", "flops"}
    assert [power.factor for power in predict([one.gaps], Noise(0.01, 0.3), studies=20)] == ["flops"]


def test_the_report_shows_no_interval_that_rests_on_one_pair(lone_pair):
    found = compare(lone_pair, "sliding", "all")
    (sheet,) = (block for block in advantage.held_out(found) if isinstance(block, Sheet))
    intervals = {"8-s" in row[1]: (row[5] != "", row[6]) for row in sheet.rows}
    assert intervals == {True: (False, ""), False: (True, "yes")}
    rows = [row for block in advantage.tables(found) if isinstance(block, Sheet) for row in block.rows]
    assert not [cell for row in rows for cell in row if "inf" in cell or "nan" in cell]
    axes = gap_figure(found).axes[0]
    assert sum(isinstance(one, PolyCollection) for one in axes.collections) == 1  # the band of two layers


def test_two_pairs_at_a_depth_give_a_verdict_again(lone_pair, study):
    second = [o for o in study(3, seeds=2) if o.depth == 8 and o.stratum.endswith("200000 8-s0")]
    kept = [o for o in lone_pair if o.name not in {s.name for s in second}]
    found = compare([*kept, *second], "sliding", "all")
    assert [change.factor for change in found.variants["bst"].changes] == ["flops", "depth"]
    assert found.missing == {}
