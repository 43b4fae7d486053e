"""The figure of `bst ablate`: the loss increase of each intervention, and its dependence on the position."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from bst_dist.study.ablation.measure import Ablation, Increase
from bst_dist.study.report.style import COLOURS, GREY, INCHES
from bst_dist.study.statistics import Estimate

CURVES = ("zero", "no-self", "forget", "own-block", "shuffle", "delay", "replace", "noise", "no-cross")
"""Kinds of intervention in the order of importance of their curves. Only the first MOST_CURVES present are drawn."""
MOST_CURVES = 5
THRESHOLD = 0.01
"""Nats per token up to which the symlog scales are linear."""


def draw(found: Ablation, trained_length: int) -> Figure:
    """Return the figure. Left: one row per intervention, with a mark for each layer and for all layers together.

    Right: the increase by position, with the intervention in all layers.
    """
    names = list(dict.fromkeys(str(increase.intervention) for increase in found.increases))
    figure = Figure(figsize=(INCHES[0], max(4.2, 1.2 + 0.3 * len(names))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.15))
    cost, document, block = (
        figure.add_subplot(grid[:, 0]),
        figure.add_subplot(grid[0, 1]),
        figure.add_subplot(grid[1, 1]),
    )
    _costs(cost, found.increases, names)
    for increase, colour in zip(_telling(found.increases), COLOURS, strict=False):
        _by_place(document, found.document_edges, increase.in_document, colour, str(increase.intervention))
        _by_place(block, found.block_edges, increase.in_block, colour, str(increase.intervention))
    _finish(document, block, found.document_edges, trained_length)
    columns = 2 if len(cost.get_legend_handles_labels()[0]) < 7 else 3
    figure.legend(*cost.get_legend_handles_labels(), loc="outside lower left", ncols=columns)
    figure.legend(*block.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    return figure


def _telling(found: Sequence[Increase]) -> list[Increase]:
    """Return the first increase of each kind, which is the one in all layers if there is one."""
    first = {increase.intervention.kind: increase for increase in reversed(found)}
    return [first[kind] for kind in CURVES if kind in first][:MOST_CURVES]


def _costs(axes: Axes, found: Sequence[Increase], names: list[str]) -> None:
    """Draw the increases with two standard errors, with one row per intervention and one mark per layer."""
    groups = ["all", *sorted({increase.layers[0] for increase in found if len(increase.layers) == 1})]
    for number, group in enumerate(groups):
        chosen = [i for i in found if (len(i.layers) > 1 if group == "all" else tuple(i.layers) == (group,))]
        if not chosen:
            continue
        shift = (number - (len(groups) - 1) / 2) * 0.7 / len(groups)
        axes.errorbar(
            [increase.loss.value for increase in chosen],
            [names.index(str(increase.intervention)) + shift for increase in chosen],
            xerr=[2 * (increase.loss.standard_error or 0.0) for increase in chosen],
            fmt="o",
            markersize=3.5 if group == "all" else 2.5,
            linewidth=0.8,
            color="#000000" if group == "all" else COLOURS[(number - 1) % len(COLOURS)],
            label="all at once" if group == "all" else f"layer {group}",
        )
    axes.axvline(0, color=GREY, linewidth=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=THRESHOLD)
    axes.margins(x=0.08)
    axes.set_xlabel("nats per token more")
    axes.set_title("increase of the loss, ± 2 standard errors")


def _by_place(axes: Axes, edges: list[int], values: list[Estimate], colour: str, name: str) -> None:
    """Draw one step per bin, with a band of one standard error."""
    heights = [value.value for value in values]
    errors = [value.standard_error or 0.0 for value in values]
    axes.stairs(heights, edges, baseline=None, label=name, linewidth=1.1, color=colour)
    low, high = ([h + sign * e for h, e in zip(heights, errors, strict=True)] for sign in (-1, 1))
    axes.stairs(high, edges, baseline=low, fill=True, color=colour, alpha=0.15, linewidth=0)


def _finish(document: Axes, block: Axes, edges: list[int], trained_length: int) -> None:
    document.set_xscale("symlog", base=2, linthresh=edges[1])
    document.set_xticks(edges[1:])
    document.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    document.minorticks_off()
    document.tick_params(axis="x", labelsize=7)
    document.set_title("by the token's place in its document")
    if edges[0] < trained_length < edges[-1]:
        document.axvline(trained_length, color=GREY, linewidth=0.8, linestyle=":")
        document.annotate(
            "trained on",
            (trained_length, 0.94),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            rotation=90,
            fontsize=6.5,
            color="#555555",
        )
    block.set_title("by the token's place in its block")
    block.set_xlabel("tokens before")
    for axes in (document, block):
        axes.set_yscale("symlog", linthresh=THRESHOLD)
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.set_xlim(0, None)
        axes.set_ylabel("nats per token more")
