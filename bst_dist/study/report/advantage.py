"""Sentences and tables about a comparison: which architecture is ahead, the changes, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bst_base.terminal import Sheet
from bst_dist.study.laws.advantage import Advantage, Comparison, HeldOutGap
from bst_dist.study.laws.verdict import MARGIN, Change
from bst_dist.study.report.document import Block, Items, Paragraph
from bst_dist.study.report.formatting import number, percent, percent_interval, power, span
from bst_dist.study.statistics import Estimate

EQUAL = {"flops": "training FLOPs", "time_s": "training time"}
VERBS = {
    "grows": "grows with",
    "shrinks": "shrinks with",
    "equivalent": "does not change with",
    "undecided": "may or may not change with",
    "confounded": "cannot be judged against",
}


def answer(found: Comparison) -> Iterator[Block]:
    """Yield the first lines of a report: which architecture is ahead, and the verdicts."""
    lines = []
    for name, one in found.variants.items():
        lines.append(ahead(name, found, one))
        lines += [sentence(change, one) for change in one.changes]
    lines += not_judged(found)
    yield Items(lines or ["No pair of runs has finished: there is nothing to compare."])


def not_judged(found: Comparison) -> list[str]:
    """Return a line with the reason for each variant that has no verdict, or none over some factor."""
    judged = {name for name, one in found.variants.items() if one.changes}
    return [
        f"{name} is {'only partly' if name in judged else 'not'} judged: {why}" for name, why in found.missing.items()
    ]


def ahead(name: str, found: Comparison, one: Advantage) -> str:
    """Return a sentence about which architecture is ahead, in words, because a sign could be misread."""
    mean, equal = one.mean, EQUAL[found.axis]
    size = percent(abs(mean.value), sign=False)
    where = f"at equal {equal}, on average over {one.gaps.pairs} pairs of runs in arm {found.arm}"
    if mean.standard_error is None:
        return f"{name} and {found.baseline} differ by {size} of the loss in the only pair of runs; more are needed."
    if mean.low <= 0 <= mean.high:
        return (
            f"{name} and {found.baseline} do not differ significantly {where}: the loss of {name} is between "
            f"{_better(mean.high)} and {_better(mean.low)} (95 % interval)."
        )
    leader, other = (name, found.baseline) if mean.value > 0 else (found.baseline, name)
    near, far = sorted((abs(mean.low), abs(mean.high)))
    return (
        f"{leader} is ahead of {other} by {size} of the loss (95 % interval {percent(near, sign=False)} to "
        f"{percent(far, sign=False)}) {where}."
    )


def _better(value: float) -> str:
    return f"{percent(abs(value), sign=False)} {'lower' if value > 0 else 'higher'}"


def sentence(change: Change, one: Advantage) -> str:
    """Return a sentence about one verdict, with the size of the change and its range."""
    unit = change.unit
    text = (
        f"The advantage of {change.variant} {VERBS[change.answer]} {unit.name}: "
        f"{percent_interval(change.change)} of the loss per "
        f"{unit.per}, from {power(change.from_value)} to {power(change.to_value)}; "
        f"{change.answer}"
    )
    if change.answer == "undecided":
        more = one.more_pairs[change.factor]
        text += (
            ", and no number of pairs would show it"
            if more is None
            else f", and about {more:,} more pairs of runs are needed"
        )
    if change.answer == "confounded":
        off = f"{100 * math.expm1(change.mismatch):+.1f} %"
        found = one.adjusted.get(change.factor)
        text += f": the ratio of parameter counts ({change.variant} to baseline) changes by {off} over this range. " + (
            f"Corrected for the sizes: {percent_interval(found)}"
            if found
            else "There are too few pairs to correct for the sizes"
        )
    return text + "."


def tables(found: Comparison) -> Iterator[Block]:
    """Yield the tables with all numbers of a comparison."""
    yield Sheet(
        (
            "variant",
            "pairs",
            "mean advantage, % of the loss",
            "95 % interval",
            "compute-equivalent gain",
            "ln N − baseline's",
        ),
        [_mean_row(name, one) for name, one in found.variants.items()],
    )
    yield from _changes(found)
    lines = [line for name, one in found.variants.items() for line in _more(name, found, one)]
    if lines:
        yield Items(lines)
    yield from _zones(found)
    yield from _contrasts(found)


def _changes(found: Comparison) -> Iterator[Block]:
    """Yield the table of how the advantage changes with compute and with depth, with the verdicts."""
    changes = [_change_row(change) for one in found.variants.values() for change in one.changes]
    if changes:
        names = (
            "variant",
            "over",
            "change",
            "95 % interval",
            "per",
            "p robust",
            "p permutation",
            "p, Holm",
            "p equivalent, Holm",
            "verdict",
        )
        yield Sheet(names, changes)
        yield Paragraph(
            f"Changes within ±{percent(MARGIN, 1, sign=False)} of the loss per doubling of depth or "
            "tenfold of compute count as equivalent to no change."
        )


def _contrasts(found: Comparison) -> Iterator[Block]:
    """Yield the table of the differences between the other arms and the arm of the verdict."""
    rows = [
        [name, arm, what, percent(e.value), _interval(e)]
        for name, one in found.variants.items()
        for arm, parts in one.contrasts.items()
        for what, e in parts.items()
    ]
    if rows:
        yield Paragraph(
            f"Other arms minus arm {found.arm}: the difference of the mean advantage and of its changes. "
            "There is no verdict on these."
        )
        yield Sheet(("variant", "arm", "quantity", "difference", "95 % interval"), rows)


def _zones(found: Comparison) -> Iterator[Block]:
    """Yield the table of the advantage by zone of the sequence (`laws/zones.py`)."""
    rows = [
        [
            name,
            z.arm,
            z.zone,
            str(z.pairs),
            percent(z.mean.value),
            _interval(z.mean),
            percent(z.change.value) if z.change else "",
            _interval(z.change),
            z.answer or "",
        ]
        for name, one in found.variants.items()
        for z in one.zones
    ]
    if rows:
        yield Paragraph(
            "By position in the sequence: the first window, the rest of what stacked windows reach, and "
            "everything beyond. The rule is applied to each part separately, against depth, in arm "
            f"{found.arm} only. A study must name its primary part before it has data."
        )
        yield Sheet(
            (
                "variant",
                "arm",
                "part",
                "pairs",
                "mean advantage",
                "95 % interval",
                "change per doubling of depth",
                "95 % interval",
                "verdict",
            ),
            rows,
        )


def _interval(one: Estimate | None) -> str:
    return f"{percent(one.low)} to {percent(one.high)}" if one and one.standard_error is not None else ""


def held_out(found: Comparison) -> Iterator[Block]:
    """Yield the table of held-out pairs, with the predictions from the other sizes."""
    rows = [
        [
            name,
            out.stratum,
            power(out.flops),
            percent(out.observed),
            percent(out.expected.value),
            _interval(out.expected),
            _inside(out),
        ]
        for name, one in found.variants.items()
        for out in one.held_out
    ]
    if rows:
        yield Paragraph("The held-out size: the advantage of each pair, and the prediction from the other sizes.")
        yield Sheet(("variant", "stratum", "FLOPs", "advantage", "predicted", "95 % interval", "inside"), rows)


def _inside(out: HeldOutGap) -> str:
    """Return whether a held-out gap is inside its interval; an empty string without one, as it rests on one pair."""
    if out.expected.standard_error is None:
        return ""
    return "yes" if out.expected.low <= out.observed <= out.expected.high else "no"


def _more(name: str, found: Comparison, one: Advantage) -> Iterator[str]:
    """Yield lines with the results that are in no table."""
    if one.interaction is not None:
        yield (
            f"{name}, size × depth interaction: per tenfold of compute, the change per doubling of depth changes by "
            f"{percent_interval(one.interaction)}"
        )
    if one.crossing is not None:
        yield (
            f"{name} and {found.baseline} are equal at {power(one.crossing.flops)} FLOPs (95 % interval "
            f"{span(one.crossing.low, one.crossing.high)}) at the mean depth of the sweep"
        )
    elif any(c.factor == "flops" for c in one.changes):
        yield f"{name}: the data do not determine the compute at which it equals {found.baseline}"
    if one.by_document is not None:
        yield (
            f"{name}, by document: {percent_interval(one.by_document)} over {one.documents} validation documents, "
            f"each counted once; {name} is better on {one.better_documents}"
        )
    yield from (f"left out: {line}" for line in one.gaps.left_out)


def _mean_row(name: str, one: Advantage) -> list[str]:
    gain, least, most = one.gain, one.gaps.mismatch.min(), one.gaps.mismatch.max()
    beyond = int(np.isnan(one.gaps.log_gain).sum())
    interval = "" if gain.standard_error is None else f" ({math.exp(gain.low):.3f} to {math.exp(gain.high):.3f})"
    return [
        name,
        str(one.gaps.pairs),
        percent(one.mean.value),
        _interval(one.mean),
        number(math.exp(gain.value) if math.isfinite(gain.value) else None, ".3f")
        + interval
        + (f"; without {beyond} of {len(one.gaps)}, which the baseline's curve does not reach" if beyond else ""),
        f"{least:+.3f} to {most:+.3f}",
    ]


def _change_row(change: Change) -> list[str]:
    return [
        change.variant,
        change.unit.name,
        percent(change.change.value),
        f"{percent(change.change.low)} to {percent(change.change.high)}",
        change.unit.per,
        f"{change.p_robust:.3f}",
        f"{change.p_permutation:.3f}",
        f"{change.p_difference:.3f}",
        f"{change.p_equivalence:.3f}",
        change.answer,
    ]
