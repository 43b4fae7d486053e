"""The verdict rule, on repeated synthetic studies with known answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bst_dist.study.laws import gap, verdict
from bst_dist.study.laws.advantage import compare
from bst_dist.study.statistics import Estimate


def gaps_of(observed, variant="bst"):
    return gap.pair(observed, variant, "sliding", "all")


def judge(observed, draws=199):
    changes, _ = verdict.judge([gaps_of(observed)], draws)
    return {change.factor: change for change in changes}


def test_depth_change_intervals_have_their_nominal_coverage(study):
    tried = 60
    changes = [judge(study(seed, per_depth=0.01), 9)["depth"].change for seed in range(tried)]
    hits = sum(change.low <= 0.01 * np.log(2) <= change.high for change in changes)
    assert stats.binom.cdf(hits, tried, 0.95) > 0.005, f"{hits} of {tried}"


def test_false_verdicts_are_rare_without_a_change(study):
    answers = [change.answer for seed in range(40) for change in judge(study(seed, noise=0.01)).values()]
    false = sum(answer in ("grows", "shrinks") for answer in answers)
    assert stats.binom.sf(false - 1, len(answers), 0.05) > 0.005, f"{false} of {len(answers)}"


@pytest.mark.parametrize(
    ("truth", "factor", "answer"),
    [
        ({"per_depth": 0.03}, "depth", "grows"),
        ({"per_depth": -0.03}, "depth", "shrinks"),
        ({"per_flops": 0.02}, "flops", "grows"),
        ({"noise": 0.0005}, "depth", "equivalent"),
        ({"noise": 0.03}, "depth", "undecided"),
    ],
)
def test_verdict_rule_gives_the_correct_answer(study, truth, factor, answer):
    assert judge(study(11, **truth))[factor].answer == answer


def test_equivalence_margin_is_per_doubling_of_depth(study, observation):
    """0.4 % per doubling over seven doublings is 2.8 % in total, and still below the margin."""
    wide = [
        observation(
            name,
            size,
            depth,
            seed,
            m,
            3 * (size * m) ** -0.1 * np.exp(-0.004 * np.log2(depth) * (name == "bst") + 1e-4 * seed * (-1) ** depth),
        )
        for name in ("sliding", "bst")
        for size in (1e5, 4e5)
        for depth in (1, 8, 128)
        for seed in (0, 1)
        for m in (5.0, 20.0)
    ]
    change = judge(wide)["depth"]
    assert change.change.value == pytest.approx(0.004, abs=1e-3)
    assert change.answer == "equivalent"


def test_verdict_uses_the_larger_p_value(study):
    """If the t test and the permutation test disagree, the verdict must follow the more conservative one."""
    seen = set()
    for seed in range(60):
        for change in judge(study(seed, per_depth=0.009, noise=0.008, seeds=1)).values():
            seen.add(change.p_robust < change.p_permutation)
            assert change.p_difference >= max(change.p_robust, change.p_permutation)
    assert seen == {True, False}


def test_unequal_sizes_give_no_verdict_but_an_adjusted_change(study):
    """As in the first study: the variant is larger when deep, smaller when shallow; larger models lose at equal C."""

    def parameters(name, depth, size):
        return size * ({2: 0.87, 8: 1.17}[depth] if name == "bst" else {2: 1.02, 8: 0.97}[depth])

    observed = study(1, noise=0.001, parameters=parameters, slope=0.073)
    found = compare(observed, "sliding", "all").variants["bst"]
    change = next(c for c in found.changes if c.factor == "depth")
    assert change.answer == "confounded"
    assert change.change.value * 2 < -0.02  # what was published
    adjusted = found.adjusted["depth"]
    assert adjusted.low <= 0 <= adjusted.high
    assert abs(adjusted.value) < 0.002


def test_identical_architecture_is_equivalent(study, observation):
    base = [o for o in study(0) if o.architecture == "sliding"]
    twin = [observation("twin", o.parameters, int(o.depth), o.seed, o.length, o.loss) for o in base]
    found = compare([*base, *twin], "sliding", "all")
    assert {c.answer for c in found.variants["twin"].changes} == {"equivalent"}
    assert found.variants["twin"].mean.value == 0


def test_variant_with_too_few_pairs_does_not_affect_other_verdicts(study):
    strong = study(3, per_depth=0.03, variants=("bst",), noise=0.003)
    weak = [
        o
        for o in study(3, variants=("weak",), noise=0.003)
        if o.architecture == "weak" and o.seed == 0 and o.depth == 2
    ]
    found = compare([*strong, *weak], "sliding", "all")
    assert "are too few for" in found.missing["weak"]
    assert next(c for c in found.variants["bst"].changes if c.factor == "depth").answer == "grows"
    assert found.variants["weak"].mean.value == pytest.approx(0.01, abs=0.02)


def test_verdict_at_equal_time_needs_an_undisturbed_machine(study):
    rows = study(3, mean=0.01, per_depth=0.02, noise=0.001)

    def compared(step_time_excess):
        timed = [replace(o, step_time_excess=step_time_excess if place == 7 else 0.02) for place, o in enumerate(rows)]
        return compare(timed, "sliding", "all", "time_s")

    assert {c.factor for c in compared(0.09).variants["bst"].changes} == {"flops", "depth"}
    for step_time_excess, why in ((0.4, "took 40% longer than its fastest tenth"), (np.nan, "is not known")):
        found = compared(step_time_excess)
        assert found.variants["bst"].changes == []
        assert why in found.missing["bst"]
        assert rows[7].name in found.missing["bst"]
    assert compare(rows, "sliding", "all").missing == {}  # not needed at equal compute


def test_verdict_is_within_one_arm_and_others_are_contrasts(study):
    near = study(5, mean=0.0, noise=0.0005, arm="near")
    far = study(6, mean=0.05, per_depth=-0.03, noise=0.0005, arm="far")
    found = compare([*near, *far], "sliding", "near").variants["bst"]
    assert next(c for c in found.changes if c.factor == "depth").answer == "equivalent"
    assert found.contrasts["far"]["mean"].value == pytest.approx(0.05, abs=0.002)
    assert found.contrasts["far"]["depth"].value == pytest.approx(-0.03 * np.log(2), abs=0.001)


def test_crossing_interval_covers_the_point_of_zero_gap(study):
    expected = 2e12 * np.exp(-0.01 / 0.02)  # at the mean depth, where the depth term is 0
    hits = 0
    for seed in range(40):
        found = verdict.crossing(gaps_of(study(seed, mean=0.01, per_flops=0.02, noise=0.002)))
        hits += found.low <= expected <= found.high
    assert stats.binom.cdf(hits, 40, 0.95) > 0.005
    assert verdict.crossing(gaps_of(study(5, mean=0.01, noise=0.01))) is None


@pytest.mark.parametrize("seed", range(3))
def test_crossing_interval_is_fiellers_interval(study, seed):
    """Fieller's interval: at its bounds (a + b x)^2 equals t^2 times its variance."""
    gaps = gaps_of(study(seed, mean=0.01, per_flops=0.02, noise=0.002))
    found = verdict.crossing(gaps)
    matrix, names = verdict.columns(gaps)
    fitted = verdict.regress(matrix, gaps.gap, gaps.stratum)
    weights = np.zeros(len(names) + 1)
    for bound in (found.low, found.high):
        weights[0], weights[1 + names.index("flops")] = 1, np.log(bound) - np.log(gaps.flops).mean()
        value, variance = weights @ fitted.values, weights @ fitted.covariance @ weights
        assert abs(value) == pytest.approx(stats.t.ppf(0.975, fitted.degrees) * np.sqrt(variance), rel=1e-6)
    assert found.low < found.high


def test_p_value_without_error_depends_only_on_the_sign():
    assert verdict.tail(np.array([1.0, -1.0, 0.0]), np.zeros(3), 4).tolist() == [0.0, 1.0, 0.5]


def test_contrast_combines_two_independent_errors():
    one, other = Estimate(1.0, 0.3, 9), Estimate(3.5, 0.4, 5)
    found = verdict._difference(one, other)
    assert (found.value, found.standard_error, found.degrees) == (2.5, pytest.approx(0.5), 5)
    alone = Estimate(1.0, None)
    assert verdict._difference(alone, other) == Estimate(2.5, None)
    assert verdict._difference(other, alone) == Estimate(-2.5, None)


def test_interaction_of_size_and_depth_is_detected(study):
    observed = study(2, noise=0.0005, seeds=2)
    gaps = gaps_of(observed)
    flops, depth = np.log10(gaps.flops), np.log2(gaps.depth)
    product = (flops - flops.mean()) * (depth - depth.mean())
    found = verdict.interaction(gap.Gaps(**{**vars(gaps), "gap": gaps.gap + 0.01 * product}))
    assert found.low < 0.01 < found.high
    assert found.p_value < 0.01


def test_held_out_size_is_inside_its_prediction_interval(study):
    hits = tried = 0
    for seed in range(12):
        observed = study(seed, per_flops=0.01, noise=0.003, seeds=2, held_out=(1e6,))
        ours = gaps_of([o for o in observed if not o.held_out])
        out = gaps_of([o for o in observed if o.held_out])
        for place, expected in enumerate(verdict.predict_gap(ours, out)):
            tried += 1
            hits += expected.low <= out.gap[place] <= expected.high
    assert tried == 12 * 2 * 2 * 3
    assert 0.85 * tried < hits < tried  # 95 % of the pairs; three pairs each are correlated
    told = compare(observed, "sliding", "all").variants["bst"]
    assert len(told.held_out) == 12
    assert told.gaps.flops.max() < min(o.flops for o in told.held_out)


def test_needed_pairs_do_not_include_existing_ones(study):
    observed = study(11, noise=0.03)
    found = compare(observed, "sliding", "all").variants["bst"]
    change = next(change for change in found.changes if change.factor == "depth")
    assert change.answer == "undecided"
    smallest = (change.change.standard_error / verdict.MARGIN) ** 2 * change.pairs  # for an error equal to the margin
    assert found.more_pairs["depth"] > smallest - change.pairs > 1


@pytest.mark.parametrize(("documents", "mean"), [((1.0, 2.0, 4.0), True), ((1.0,), False)])
def test_documents_with_lower_loss_are_counted_as_better(study, documents, mean):
    def of(observation):
        better = 0.9 if observation.architecture == "bst" else 1.0
        return replace(observation, by_document=(documents[0] * better, *documents[1:]))

    found = compare([of(o) for o in study(3)], "sliding", "all").variants["bst"]
    assert (found.better_documents, found.documents) == (1, len(documents))  # the other documents are equal
    assert (found.by_document is not None) == mean  # one document has no standard error


def test_rule_in_words_has_every_answer_and_limit():
    text = " ".join(part if isinstance(part, str) else " ".join(part) for part in verdict.RULE)
    (answers,) = (part for part in verdict.RULE if not isinstance(part, str))
    named = [name for answer in answers for name in answer.partition(":")[0].split(" or ")]
    assert sorted(named) == sorted(verdict.ANSWERS)
    for limit in ("At level 0.05 ", "more than 2 % of N ", "the margin, 0.5 % of the loss "):
        assert limit in text
