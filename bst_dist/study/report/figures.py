"""The figures of a sweep's report, at the text width of a paper. Curves differ in colour and mark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterMathtext, LogLocator, NullFormatter

from bst_dist.study.laws.advantage import Advantage, Comparison
from bst_dist.study.laws.gap import Gaps
from bst_dist.study.laws.law import Law
from bst_dist.study.laws.observation import Observation, grid
from bst_dist.study.laws.regression import RegressionError, regress
from bst_dist.study.laws.scaling import Laws
from bst_dist.study.laws.verdict import MARGIN, columns
from bst_dist.study.report.style import INCHES, marked, panels
from bst_dist.study.statistics import Estimate, mean

LABELS: dict[str, tuple[Callable[[Gaps], np.ndarray], str]] = {
    "flops": (lambda gaps: gaps.flops, "training FLOPs"),
    "time_s": (lambda gaps: gaps.flops, "training FLOPs of the variant, at equal time"),
}


def gap_figure(found: Comparison) -> Figure:
    """Return the figure of the advantage over compute: one panel per variant, one line with its 95 % band per depth.

    Small marks are measurements, with lines between the lengths of one pair of runs. Hollow marks were held out. The
    grey band is the margin of equivalence.
    """
    values, label = LABELS[found.axis]
    depths = sorted({float(d) for one in found.variants.values() for d in one.gaps.depth})
    figure, every = panels(len(found.variants), 2.4, sharey=True)
    for axes, (name, one) in zip(every, found.variants.items(), strict=False):
        for number, depth in enumerate(depths):
            _measured(axes, one.gaps, depth, values(one.gaps), marked(number))
            _band(axes, one, depth, marked(number)["color"])
        for out in one.held_out:
            look = marked(depths.index(out.depth)) if out.depth in depths else marked(len(depths))
            axes.plot(out.flops, 100 * out.observed, **look, fillstyle="none", markersize=4)
        axes.axhline(0, color="#000000", linewidth=0.6)
        axes.axhspan(-100 * MARGIN, 100 * MARGIN, color="#000000", alpha=0.06, linewidth=0)
        axes.set_title(name)
        _logarithmic(axes, label)
    every[0].set_ylabel(f"advantage over {found.baseline},\n% of the loss")
    handles = [_line(**marked(number)) for number in range(len(depths))]
    figure.legend(handles, [f"{depth:g} layers" for depth in depths], loc="outside upper center", ncols=5)
    return figure


def loss_figure(observed: Sequence[Observation], laws: Laws | None) -> Figure:
    """Return the figure of the loss over compute, one panel per depth.

    Lines join the lengths of one run, and dashed lines are the chosen law at each size. Hollow marks were held out.
    """
    names = list(dict.fromkeys(o.architecture for o in grid(observed)))
    usable = [o for o in observed if o.usable and o.rate_factor == 1 and o.architecture in names]
    depths = sorted({o.depth for o in usable})
    figure, every = panels(len(depths), 2.7, sharey=True)
    for axes, depth in zip(every, depths, strict=False):
        for number, name in enumerate(names):
            own = [o for o in usable if (o.architecture, o.depth) == (name, depth)]
            for run in dict.fromkeys(o.run for o in own):
                line = sorted((o for o in own if o.run == run), key=lambda o: o.flops)
                fill = "none" if line[0].held_out else "full"
                axes.plot(
                    [o.flops for o in line],
                    [o.loss for o in line],
                    **marked(number),
                    markersize=2.5,
                    fillstyle=fill,
                    alpha=0.8,
                )
            law = laws.architectures[name].law if laws and name in laws.architectures else None
            if law is not None:
                _law_lines(axes, [o for o in own if not o.held_out], law, str(marked(number)["color"]))
        _logarithmic(axes, "training FLOPs")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.2f}")
        axes.set_title(f"{depth:g} layers")
    every[0].set_ylabel("validation loss, nats per token")
    figure.legend([_line(**marked(n)) for n in range(len(names))], names, loc="outside upper center", ncols=4)
    return figure


def place_figure(found: Comparison) -> Figure | None:
    """Return the figure of the advantage by position, with 95 % intervals; None if no run has losses by position."""
    curves = {name: one.by_block for name, one in found.variants.items() if len(one.by_block) > 1}
    if not curves:
        return None
    figure = Figure(figsize=(INCHES[0] / 2, 2.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, gaps) in enumerate(curves.items()):
        axes.errorbar(
            range(1, len(gaps) + 1),
            [100 * g.value for g in gaps],
            yerr=[100 * (g.half_width or 0) for g in gaps],
            **marked(number),
            markersize=4,
            capsize=2,
            label=name,
        )
    axes.axhline(0, color="#000000", linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block of the sequence")
    axes.set_ylabel(f"advantage over {found.baseline},\n% of the loss")
    axes.legend()
    return figure


def _measured(axes: Axes, gaps: Gaps, depth: float, values: np.ndarray, look: dict[str, Any]) -> None:
    for stratum in np.unique(gaps.stratum[gaps.depth == depth]):
        own = np.flatnonzero(gaps.stratum == stratum)
        own = own[np.argsort(values[own])]
        axes.plot(values[own], 100 * gaps.gap[own], **{**look, "linewidth": 0.4}, markersize=2.5, alpha=0.4)


def _band(axes: Axes, one: Advantage, depth: float, colour: str) -> None:
    """Draw the rule's regression at one depth over compute, with its 95 % band; without a regression, the mean gap."""
    gaps = one.gaps
    own = gaps.depth == depth
    along = np.geomspace(gaps.flops[own].min(), gaps.flops[own].max(), 20)
    estimates = _regression(gaps, depth, along)
    if any(e.standard_error is None for e in estimates):
        pairs = [gaps.gap[own & (gaps.stratum == b)].mean() for b in np.unique(gaps.stratum[own])]
        estimate = mean(pairs)
        axes.errorbar(
            np.exp(np.log(gaps.flops[own]).mean()),
            100 * estimate.value,
            yerr=100 * (estimate.half_width or 0.0),
            fmt="_",
            color=colour,
            capsize=2,
        )
        return
    axes.plot(along, [100 * e.value for e in estimates], color=colour, linewidth=1.3)
    axes.fill_between(
        along,
        [100 * e.low for e in estimates],
        [100 * e.high for e in estimates],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )


def _regression(gaps: Gaps, depth: float, along: np.ndarray) -> list[Estimate]:
    """Return the gaps that the rule's regression has at one depth, at each compute (FLOPs) of `along`.

    They have no standard errors if there is no regression, or if at this depth it rests on one pair of runs.
    """
    matrix, names = columns(gaps)
    try:
        found = regress(matrix, gaps.gap, gaps.stratum)
    except RegressionError:
        return [Estimate(np.nan, None)] * len(along)
    means = {"depth": np.log(depth), "tokens_per_parameter": np.log(gaps.tokens_per_parameter).mean()}
    estimates = []
    for flops in np.log(along):
        at = {**means, "flops": flops}
        weights = np.array([1.0, *(at[n] - np.log(getattr(gaps, n)).mean() for n in names)])
        estimates.append(found.estimate(weights))
    return estimates


def _law_lines(axes: Axes, own: Sequence[Observation], law: Law, colour: str) -> None:
    for size in sorted({round(o.parameters, -2) for o in own}):
        at = [o for o in own if round(o.parameters, -2) == size]
        tokens = np.geomspace(min(o.tokens for o in at), max(o.tokens for o in at), 30)
        losses = law.loss(np.full(30, at[0].parameters), tokens, at[0].width, at[0].depth)
        axes.plot(6 * at[0].parameters * tokens, losses, "--", color=colour, linewidth=0.7, alpha=0.8)


def _logarithmic(axes: Axes, label: str) -> None:
    """Set a logarithmic x axis with ticks like 10¹¹; below two decades also at 2 and 5 times powers of ten."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    few = high / low < 100
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.xaxis.set_major_formatter(LogFormatterMathtext(labelOnlyBase=False))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if few:
        axes.tick_params(axis="x", labelsize=6.5)
    axes.set_xlabel(label)


def _line(**look: Any) -> Line2D:
    return Line2D([], [], markersize=4, **look)
