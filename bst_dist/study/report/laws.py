"""Sentences and tables about fitted laws: the fits, their predictions and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bst_base.terminal import Sheet
from bst_dist.study.laws.scaling import ArchitectureLaws, Fitted, Laws, Optimum, Prediction
from bst_dist.study.laws.uncertainty import UNKNOWNS, Interval
from bst_dist.study.report.document import Block, Heading, Items, Paragraph
from bst_dist.study.report.formatting import number, percent_interval, power, span
from bst_dist.study.statistics import Estimate

EXPONENTS = ("E", "A", "alpha", "G", "gamma", "B", "beta", "kappa")


def blocks(found: Laws, baseline: str | None = None) -> Iterator[Block]:
    """Yield the blocks about all fits."""
    for name, laws in found.architectures.items():
        if name:
            yield Heading(3, name)
        yield from _architecture(laws)
    if baseline is not None:
        yield Heading(3, "Shared irreducible loss E")
        yield from _shared(found, baseline)


def _architecture(laws: ArchitectureLaws) -> Iterator[Block]:
    if rows := [_fit_row(fitted) for fitted in laws.fits if fitted.law]:
        yield Sheet(("form, objective", *EXPONENTS, "error on held-out shapes", "error on the largest size"), rows)
    reasons = {(f.form, f.why_not) for f in laws.fits if not f.law}
    lines = [f"{form}: not fitted: {why}" for form, why in sorted(reasons)]
    lines += [f"d ln L / d ln {name} = {_slope(e)}, over the range of the points" for name, e in laws.slopes.items()]
    if laws.chosen is not None:
        lines += list(_trust(laws))
    yield Items(lines)
    if laws.predictions:
        yield Paragraph("Held-out runs, and the prediction of the law fitted to the others:")
        yield Sheet(
            ("run", "N", "D", "loss", "predicted", "95 % interval", "error", "inside"),
            [_prediction_row(p) for p in laws.predictions],
        )
    if laws.optima:
        yield Paragraph("The best model for a compute budget, with 95 % intervals:")
        yield Sheet(("FLOPs", "N", "D", "width", "depth", ""), [_optimum_row(o) for o in laws.optima])


def _slope(slope: Estimate) -> str:
    if slope.standard_error is None:
        return f"{slope.value:+.4f} (it rests on one run: no interval)"
    return f"{slope.value:+.4f} (95 % interval {slope.low:+.4f} to {slope.high:+.4f})"


def _trust(laws: ArchitectureLaws) -> Iterator[str]:
    """Yield lines about the chosen form: its unknowns, and the evidence against it."""
    yield f"chosen: the {laws.chosen} form, which predicts held-out shapes best"
    for name in (*UNKNOWNS[laws.chosen or "chinchilla"], "optimal_N_exponent"):
        if (one := laws.intervals.get(name)) is not None and name != "log_aspect":
            yield f"{name.replace('_', ' ')} = {_interval(one)}"
    if laws.non_embedding_alpha is not None:
        yield f"alpha = {_interval(laws.non_embedding_alpha)} when N excludes the embedding and the head"
    if laws.no_valley:
        yield "no optimum: the loss has no minimum over width / depth within the tried shapes"
    elif (one := laws.intervals.get("log_aspect")) is not None:
        interval = f"{math.exp(one.value):.3g} (95 % interval {_exp(one.low)} to {_exp(one.high)})"
        lost = "not determined: many laws of resampled runs have none"
        yield f"best width / depth: {interval if math.isfinite(one.low) else lost}"
    if (lack := laws.lack_of_fit) is not None:
        told = "the residuals are larger than the scatter within a shape" if lack.p_value < 0.05 else "not detected"
        yield f"lack of fit: F = {lack.statistic:.2f}, {_p(lack.p_value)}: {told}"
    if laws.isoflop_exponent is not None:
        yield f"exponent of the optimal N in C by isoFLOP profiles: {laws.isoflop_exponent:.3f}"
    if laws.not_identified:
        yield "the law is not identified and must not be extrapolated; use the slopes above instead:"
        yield from (f"not identified: {reason}" for reason in laws.not_identified)


def _shared(found: Laws, baseline: str) -> Iterator[Block]:
    lines = []
    for name, reach in found.reach.items():
        told = {
            "equal": "sees as far as",
            "different": "does not see exactly as far as",
            "undecided": "may or may not see as far as",
        }[reach.answer]
        lines.append(
            f"{name} {told} {baseline}: from the first to the last block of a sequence, its advantage changes "
            f"by {percent_interval(reach.difference)}"
        )
    for name, difference in found.shared.differences.items():
        told = {"equal": "is shown to be the same", "different": "differs", "undecided": "may differ"}
        lines.append(
            f"E of {name} {told[found.shared.answers[name]]}: {percent_interval(difference)} of the lowest loss"
        )
    if found.shared.laws:
        e = next(iter(found.shared.laws.values())).E
        each = ", ".join(f"{n}: alpha {law.alpha:.3f}, beta {law.beta:.3f}" for n, law in found.shared.laws.items())
        lines.append(f"with a shared E = {e:.4g}: {each}")
    elif found.shared.why_not:
        lines.append(f"no law with a shared E is fitted: {found.shared.why_not}")
    yield Items(lines)


def _fit_row(fitted: Fitted) -> list[str]:
    values = [getattr(fitted.law, name) for name in EXPONENTS]
    if fitted.form != "aspect":
        values[-1] = None
    return [
        f"{fitted.form}, {fitted.objective}",
        *(number(v, ".4g") for v in values),
        number(fitted.shape_error, ".2%"),
        number(fitted.largest_error, ".2%"),
    ]


def _prediction_row(p: Prediction) -> list[str]:
    inside = "yes" if p.predicted.low <= p.observed <= p.predicted.high else "no"
    return [
        p.name,
        power(p.parameters),
        power(p.tokens),
        f"{p.observed:.4f}",
        f"{p.predicted.value:.4f}",
        f"{p.predicted.low:.4f} to {p.predicted.high:.4f}",
        f"{p.predicted.value / p.observed - 1:+.2%}",
        inside,
    ]


def _optimum_row(o: Optimum) -> list[str]:
    cells = [
        "not known"
        if i is None
        else f"{power(i.value)} ({span(i.low, i.high)})"
        if math.isfinite(i.low)
        else "not determined"
        for i in (o.parameters, o.tokens, o.width, o.depth)
    ]
    told = "extrapolated" if o.extrapolated else "largest compute of the points"
    if o.aspect is not None:
        told += f"; N and D at width / depth {o.aspect:.3g}, the nearest to the best that was tried"
    return [power(o.flops), *cells, told]


def _interval(one: Interval) -> str:
    return f"{one.value:.4g} (95 % interval {one.low:.4g} to {one.high:.4g})"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _exp(log: float) -> str:
    return f"{math.exp(log):.3g}" if log < 50 else "infinity"
