"""The picture of a length generalisation: the loss by position in the sequence, and by its length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bst_dist.evaluate.lengths import LengthResult
from bst_dist.evaluate.plot import INCHES, looks
from bst_dist.evaluate.statistics import Estimate


def draw(found: Mapping[str, Sequence[LengthResult]], trained_length: int) -> Figure:
    """A row of axes for each corpus by its name: left the loss by position, right by length and over that at the
    trained length. Bands and bars are standard errors over documents."""
    figure = Figure(figsize=(INCHES[0], 3.4 * len(found)), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, (name, results) in zip(parts, found.items(), strict=True):
        if len(found) > 1:
            part.suptitle(name, fontsize=8)
        grid = part.add_gridspec(2, 2, width_ratios=(1.7, 1))
        _by_position(part.add_subplot(grid[:, 0]), results, trained_length)
        loss, versus = part.add_subplot(grid[0, 1]), part.add_subplot(grid[1, 1])
        _by_length(loss, results, [each.nats_per_token for each in results], trained_length)
        loss.set_ylabel("nats per token")
        compared = [each for each in results if each.versus_trained is not None]
        _by_length(versus, compared, [each.versus_trained for each in compared], trained_length)
        versus.axhline(0, color="#777777", linewidth=0.6)
        versus.set_ylabel(f"more than at {trained_length:,}")
        versus.set_xlabel("length, tokens")
    return figure


def _by_position(axes: Axes, results: Sequence[LengthResult], trained_length: int) -> None:
    for look, each in zip(looks(len(results)), results, strict=True):
        where = np.array([np.sqrt(at.first * at.last) for at in each.positions])
        values, errors = _columns([at.nats_per_token for at in each.positions])
        axes.plot(where, values, label=f"{each.length:,}", **look)
        axes.fill_between(where, values - errors, values + errors, color=look["color"], alpha=0.15, linewidth=0)
    axes.legend(title="length")
    axes.set_xlabel("tokens read before the one predicted")
    axes.set_ylabel("nats per token")
    _scale(axes, trained_length, max(each.length for each in results), 4)


def _by_length(axes: Axes, results: Sequence[LengthResult], estimates: Sequence[Estimate], trained_length: int) -> None:
    values, errors = _columns(estimates)
    for look, each, value, error in zip(looks(len(results)), results, values, errors, strict=True):
        axes.errorbar(each.length, value, error, fmt="o", color=look["color"], markersize=4, capsize=2, linewidth=1.1)
    axes.plot([each.length for each in results], values, color="#777777", linewidth=0.6, zorder=1)
    _scale(axes, trained_length, max(each.length for each in results), 2)
    axes.margins(x=0.1)


def _scale(axes: Axes, trained_length: int, longest: int, step: int) -> None:
    """Powers of two, thinned out; the trained length as a dotted line."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x < 1024 else f"{x / 1024:,.0f}k"))
    axes.axvline(trained_length, color="#777777", linestyle=":", linewidth=0.8)


def _columns(estimates: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """Values and standard errors; one that is not known is drawn as none."""
    values = np.array([each.value for each in estimates], float)
    return values, np.array([each.standard_error or 0 for each in estimates], float)
