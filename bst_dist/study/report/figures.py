"""The figures of a sweep's report, at the width of a paper's text; colour and mark tell architectures apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from bst_dist.study.laws.gap import Gaps
from bst_dist.study.laws.law import Law
from bst_dist.study.laws.table import Row
from bst_dist.study.report.plot import COLOURS, INCHES

MARKS = "osD^vP*"


def loss_figure(rows: list[Row], report: dict[str, Any]) -> Figure:
    """Loss against compute, a panel a depth; points of one trunk joined, the fitted law of each size dashed."""
    done = _grid(rows)
    depths = sorted({row.depth for row in done})
    figure = Figure(figsize=(INCHES[0], 2.7), layout="constrained")
    panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for axes, depth in zip(panels, depths, strict=True):
        for name, look in _looks(done).items():
            own = [row for row in done if row.architecture == name and row.depth == depth]
            for trunk in dict.fromkeys(row.trunk for row in own):
                line = sorted((row for row in own if row.trunk == trunk), key=lambda row: row.flops)
                axes.plot(
                    [row.flops for row in line], [row.loss_nats for row in line], "-", **look, markersize=2.5, alpha=0.8
                )
            _law_lines(axes, own, report.get("architectures", {}).get(name, {}), look["color"])
        _flops_along(axes)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.2f}")
        axes.yaxis.set_minor_formatter("{x:.2f}")
        axes.set_title(f"{depth} layers")
    panels[0].set_ylabel("validation loss, nats a token")
    _legend(figure, done)
    return figure


def gap_figure(every: Sequence[Gaps], baseline: str, axis: str) -> Figure:
    """The advantage of each pair against compute and against depth, with the mean of each value and its error."""
    figure = Figure(figsize=(INCHES[0], 2.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, gaps in enumerate(every, 1):  # the baseline has the first colour
        colour = COLOURS[number % len(COLOURS)]
        for axes, factor in zip(panels, ("flops", "depth"), strict=True):
            values = getattr(gaps, factor)
            spread = 1.03 ** (number - (len(every) + 1) / 2)
            axes.plot(
                values * spread, 100 * gaps.gap, MARKS[number % len(MARKS)], color=colour, alpha=0.35, markersize=3
            )
            _means(axes, values, gaps, spread, colour)
    for axes in panels:
        axes.axhline(0, color="#000000", linewidth=0.6)
        axes.axhspan(-0.5, 0.5, color="#000000", alpha=0.06, linewidth=0)
    _flops_along(panels[0])
    panels[1].set_xscale("log")
    panels[1].set_xlabel("layers")
    depths = sorted({int(depth) for gaps in every for depth in gaps.depth})
    panels[1].set_xticks(depths, [str(depth) for depth in depths])
    panels[1].minorticks_off()
    panels[0].set_ylabel(f"advantage over {baseline},\n% of the loss at equal {axis.removesuffix('_s')}")
    handles = [_mark(number) for number in range(1, len(every) + 1)]
    figure.legend(handles, [gaps.variant for gaps in every], loc="outside upper center", ncols=4)
    return figure


def place_figure(report: dict[str, Any], baseline: str) -> Figure | None:
    """The advantage by position in the sequence; None when no run has losses by position."""
    curves = {name: found["by_place"] for name, found in report["variants"].items() if len(found["by_place"]) > 1}
    if not curves:
        return None
    figure = Figure(figsize=(INCHES[0] / 2, 2.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, gaps) in enumerate(curves.items(), 1):
        axes.plot(range(1, len(gaps) + 1), 100 * np.array(gaps), "-" + MARKS[number % len(MARKS)],
                  color=COLOURS[number % len(COLOURS)], markersize=4, label=name)  # fmt: skip
    axes.axhline(0, color="#000000", linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block of the sequence")
    axes.set_ylabel(f"advantage over {baseline},\n% of the loss")
    axes.legend()
    return figure


def _flops_along(axes: Axes) -> None:
    """Compute along the axis: ticks at 1, 2 and 5 of each power of ten, so that less than a decade has some."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.0e}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("training FLOPs")


def _means(axes: Axes, values: np.ndarray, gaps: Gaps, spread: float, colour: str) -> None:
    """The mean gap at each value, with the standard error over pairs of runs."""
    rounded = np.exp(np.round(np.log(values), 1))
    for value in np.unique(rounded):
        own = rounded == value
        by_pair = [gaps.gap[own & (gaps.block == block)].mean() for block in np.unique(gaps.block[own])]
        error = np.std(by_pair, ddof=1) / np.sqrt(len(by_pair)) if len(by_pair) > 1 else 0.0
        centre = np.exp(np.log(values[own]).mean())
        axes.errorbar(centre * spread, 100 * np.mean(by_pair), yerr=100 * error, fmt="_", color=colour, capsize=2,
                      markersize=8)  # fmt: skip


def _law_lines(axes: Axes, own: list[Row], laws: dict[str, Any], colour: str) -> None:
    chosen = laws.get(f"{laws.get('chosen')}_huber")
    if not chosen or not own:
        return
    law = Law(**{name: chosen[name] for name in Law.__dataclass_fields__})
    for size in sorted({row.size for row in own}):
        at = [row for row in own if row.size == size]
        shape = at[0]
        tokens = np.geomspace(min(row.tokens for row in at), max(row.tokens for row in at), 30)
        losses = law.loss(np.full(30, shape.parameters), tokens, shape.width / shape.depth)
        axes.plot(6 * shape.parameters * tokens, losses, "--", color=colour, linewidth=0.7, alpha=0.8)


def _grid(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.status == "done" and row.role == "grid"]


def _looks(rows: list[Row]) -> dict[str, dict[str, Any]]:
    names = list(dict.fromkeys(row.architecture for row in rows))
    return {name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[i % len(MARKS)], "linewidth": 0.7}
            for i, name in enumerate(names)}  # fmt: skip


def _legend(figure: Figure, rows: list[Row]) -> None:
    looks = _looks(rows)
    figure.legend([_line(**look) for look in looks.values()], list(looks), loc="outside upper center", ncols=4)


def _line(**look: Any) -> Line2D:
    return Line2D([], [], markersize=4, **look)


def _mark(number: int) -> Line2D:
    return _line(color=COLOURS[number % len(COLOURS)], marker=MARKS[number % len(MARKS)], linestyle="")
