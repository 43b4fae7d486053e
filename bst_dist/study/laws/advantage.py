"""The advantage of architectures over a baseline: its mean, its changes, the verdicts, and the evidence for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.gap import Axis, Gaps, gaps_by, pair
from bst_dist.study.laws.observation import Observation
from bst_dist.study.laws.power import detectable_in_standard_errors, pairs_needed
from bst_dist.study.laws.regression import RegressionError, clustered_mean, regress
from bst_dist.study.laws.verdict import (
    UNITS,
    Change,
    Crossing,
    contrast,
    crossing,
    interaction,
    judge,
    mean_gain,
    mean_gap,
    predict_gap,
)
from bst_dist.study.laws.zones import Zone, zones
from bst_dist.study.statistics import Estimate, mean

QUIET = 0.1
"""At equal time, the largest `Observation.step_time_excess` of any run that still allows a verdict."""


class HeldOutGap(NamedTuple):
    """A held-out pair: its measured gap, and the gap that the other pairs predict."""

    stratum: str
    depth: float
    flops: float
    observed: float
    expected: Estimate


@dataclass(frozen=True, kw_only=True)
class Advantage:
    """The advantage of one variant over the baseline, within the arm of the verdict."""

    gaps: Gaps
    mean: Estimate
    """In ln of the loss; above 0 the variant is better."""
    gain: Estimate
    """ln of the compute-equivalent gain."""
    changes: list[Change]
    more_pairs: dict[str, int | None]
    """Factor -> number of further pairs needed, if the answer is undecided; None if no number would be enough."""
    adjusted: dict[str, Estimate]
    """Factor -> the change adjusted for the difference of sizes, if the answer is confounded and there are enough
    pairs."""
    interaction: Estimate | None
    crossing: Crossing | None
    by_block: list[Estimate]
    """Mean gap by block of the sequence; errors are clustered by pair of runs."""
    zones: list[Zone]
    """The advantage by part of the sequence (`laws/zones.py`), in each arm with sequences beyond a stack's reach."""
    by_document: Estimate | None
    better_documents: int
    documents: int
    held_out: list[HeldOutGap]
    contrasts: dict[str, dict[str, Estimate]]
    """Other arm -> the differences of the mean and of the changes from this arm. They have no verdict."""


@dataclass(frozen=True)
class Comparison:
    """The advantages of all variants over the baseline."""

    baseline: str
    axis: Axis
    arm: str
    variants: dict[str, Advantage]
    missing: dict[str, str]
    """Variants without a comparison, or without the test of a factor -> the reason."""


def compare(observed: Sequence[Observation], baseline: str, arm: str, axis: Axis = "flops") -> Comparison:
    """Return the advantage of every other architecture over the baseline in `arm` at equal `axis`, and the verdicts.

    `observed` contains the runs that are not done too: a variant without a pair counts in Holm's adjustment.
    """
    at_rate = [o for o in observed if o.rate_factor == 1]
    ours = [o for o in at_rate if not o.held_out]
    every, missing = _pairs(ours, baseline, arm, axis)
    changes, untested = judge(every, absent=len(missing)) if every else ([], {})
    if axis == "time_s" and (loud := disturbed(ours)):
        changes, untested = [], dict.fromkeys((gaps.variant for gaps in every), loud)
    undecided = any(c.answer == "undecided" for c in changes)
    detectable = detectable_in_standard_errors(every, absent=len(missing)) if undecided else {}
    arms = sorted({o.arm for o in ours} - {arm})
    others = {name: {gaps.variant: gaps for gaps in _pairs(ours, baseline, name, axis)[0]} for name in arms}
    by_zone = zones(ours, baseline, arm, arms, axis) if axis == "flops" else {}
    variants = {}
    for gaps in every:
        own = [change for change in changes if change.variant == gaps.variant]
        contrasts = {
            name: contrast(gaps, found[gaps.variant]) for name, found in others.items() if gaps.variant in found
        }
        variants[gaps.variant] = _advantage(
            at_rate, gaps, baseline, own, detectable, axis, contrasts, by_zone.get(gaps.variant, [])
        )
    return Comparison(baseline, axis, arm, variants, missing | untested)


def disturbed(observed: Sequence[Observation]) -> str:
    """Return why times of these runs allow no verdict; an empty string if the machine was quiet during all of them."""
    done = [o for o in observed if o.usable]
    worst = max(done, key=lambda o: o.step_time_excess if math.isfinite(o.step_time_excess) else math.inf, default=None)
    if worst is None:
        return ""
    if not math.isfinite(worst.step_time_excess):
        return f"whether the machine was quiet is not known of {worst.name}"
    if worst.step_time_excess > QUIET:
        return (
            f"the machine was not quiet: a median step of {worst.name} took {worst.step_time_excess:.0%} longer than "
            f"its fastest tenth, and {QUIET:.0%} is allowed for a verdict at equal time"
        )
    return ""


def _pairs(observed: Sequence[Observation], baseline: str, arm: str, axis: Axis) -> tuple[list[Gaps], dict[str, str]]:
    """Return the gaps of every variant that has a pair in the arm, and for each other variant the reason."""
    found, missing = [], {}
    for name in dict.fromkeys(o.architecture for o in observed if o.arm == arm and o.architecture != baseline):
        try:
            found.append(pair(observed, name, baseline, arm, axis))
        except UserError as error:
            missing[name] = str(error)
    return found, missing


def _advantage(
    observed: Sequence[Observation],
    gaps: Gaps,
    baseline: str,
    changes: list[Change],
    detectable: dict[str, float],
    axis: Axis,
    contrasts: dict[str, dict[str, Estimate]],
    by_zone: list[Zone],
) -> Advantage:
    ours = [o for o in observed if not o.held_out]
    by_block, strata = gaps_by(ours, gaps.variant, baseline, gaps.arm, "by_block")
    by_document, _ = gaps_by(ours, gaps.variant, baseline, gaps.arm, "by_document")
    documents = by_document.mean(0) if by_document.size else np.empty(0)
    return Advantage(
        gaps=gaps,
        mean=mean_gap(gaps),
        gain=mean_gain(gaps),
        changes=changes,
        more_pairs={c.factor: _more_pairs(c, detectable[c.factor]) for c in changes if c.answer == "undecided"},
        adjusted={
            c.factor: found
            for c in changes
            if c.answer == "confounded" and (found := adjusted(ours, gaps, baseline, c.factor)) is not None
        },
        interaction=interaction(gaps),
        crossing=crossing(gaps),
        by_block=[clustered_mean(column, strata) for column in by_block.T],
        zones=by_zone,
        by_document=mean(documents, "documents") if len(documents) > 1 else None,
        better_documents=int((documents > 0).sum()),
        documents=len(documents),
        held_out=_held_out(observed, gaps, baseline, axis),
        contrasts=contrasts,
    )


def _more_pairs(change: Change, detectable: float) -> int | None:
    needed = pairs_needed(change.pairs, change.change.standard_error or 0.0, detectable)
    return None if needed is None else max(1, needed - change.pairs)


def _held_out(observed: Sequence[Observation], gaps: Gaps, baseline: str, axis: Axis) -> list[HeldOutGap]:
    try:
        out = pair([o for o in observed if o.held_out], gaps.variant, baseline, gaps.arm, axis)
        expected = predict_gap(gaps, out)
    except UserError:
        return []
    return [
        HeldOutGap(str(out.stratum[i]), float(out.depth[i]), float(out.flops[i]), float(out.gap[i]), expected[i])
        for i in range(len(out))
    ]


def adjusted(observed: Sequence[Observation], gaps: Gaps, baseline: str, factor: str) -> Estimate | None:
    """Return the change per unit of a factor, adjusted for the difference of sizes; None if there are too few pairs.

    It comes from one regression of ln L on compute, size, depth, architecture, and architecture x both factors. So the
    dependence of the loss on N at equal compute is estimated from all runs, not assumed.
    """
    own = [
        o
        for o in observed
        if o.arm == gaps.arm
        and o.usable
        and o.stratum in set(gaps.stratum)
        and o.architecture in (gaps.variant, baseline)
    ]
    logs = {name: np.log([getattr(o, name) for o in own]) for name in ("flops", "parameters", "depth")}
    variant = np.array([float(o.architecture == gaps.variant) for o in own])
    names = [n for n in UNITS if np.ptp(logs[n]) > 0.05]
    products = [variant * (logs[n] - logs[n].mean()) for n in names]
    kept = [v - v.mean() for v in logs.values() if np.ptp(v) > 1e-9]
    columns = np.column_stack([np.ones(len(own)), variant, *kept, *products])
    try:
        found = regress(columns, np.log([o.loss for o in own]), np.array([o.stratum for o in own]))
    except RegressionError:
        return None
    weights = np.zeros(columns.shape[1])
    weights[2 + len(kept) + names.index(factor)] = -np.log(UNITS[factor].factor)
    change = found.estimate(weights)
    return None if change.standard_error is None else change
