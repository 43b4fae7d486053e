"""The figure of length generalisation: the loss by position in the sequence and by sequence length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bst_dist.study.lengths.measure import LengthResult, Position
from bst_dist.study.report.style import GREY, INCHES, looks
from bst_dist.study.statistics import Estimate

LINEAR = 0.01
"""Difference in nats up to which the symlog scale is linear. Only the beginning of a sequence has larger ones."""

_Point = TypeVar("_Point", LengthResult, Position)


def draw(found: Mapping[str, Sequence[LengthResult]], trained_length: int) -> Figure:
    """Return the figure, with four axes per corpus: the loss by position and by length, and below both the difference
    from the loss of the same tokens at the trained length. Bands and bars are standard errors over documents."""
    figure = Figure(figsize=(INCHES[0], INCHES[1] * len(found)), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, (name, results) in zip(parts, found.items(), strict=True):
        if len(found) > 1:
            part.suptitle(name, fontsize=8)
        grid = part.subplots(2, 2, width_ratios=(1.8, 1), sharex="col")
        for row, of in zip(grid, (_loss, _versus), strict=True):
            _by_position(row[0], results, of)
            _by_length(row[1], results, of)
            for axes in row:
                axes.axvline(trained_length, color=GREY, linestyle=":", linewidth=0.8)
        for axes in grid[1]:
            axes.axhline(0, color=GREY, linewidth=0.6, zorder=1)
        grid[1, 0].set_yscale("symlog", linthresh=LINEAR)
        grid[0, 0].legend(title="length", ncols=2)
        grid[0, 0].set_ylabel("nats per token")
        grid[1, 0].set_ylabel(f"nats more than at {trained_length:,}")
        grid[1, 0].set_xlabel("tokens read before the one predicted")
        grid[1, 1].set_xlabel("length, tokens")
    return figure


def _loss(of: LengthResult | Position) -> Estimate | None:
    return of.nats_per_token


def _versus(of: LengthResult | Position) -> Estimate | None:
    return of.versus_trained


def _by_position(axes: Axes, results: Sequence[LengthResult], of: Callable[[Position], Estimate | None]) -> None:
    for look, each in zip(looks(len(results)), results, strict=True):
        where, values, errors = _columns(each.positions, of, lambda at: math.sqrt(at.first * at.last))
        axes.plot(where, values, label=f"{each.length:,}", **look)
        axes.fill_between(where, values - errors, values + errors, color=look["color"], alpha=0.15, linewidth=0)
    _scale(axes)


def _by_length(axes: Axes, results: Sequence[LengthResult], of: Callable[[LengthResult], Estimate | None]) -> None:
    where, values, errors = _columns(results, of, lambda each: each.length)
    axes.plot(where, values, color=GREY, linewidth=0.6, zorder=1)
    for look, *point in zip(looks(len(results)), where, values, errors, strict=False):
        axes.errorbar(*point, fmt="o", color=look["color"], markersize=4, capsize=2, linewidth=1.1)
    _scale(axes)
    axes.set_xticks([each.length for each in results])
    axes.margins(x=0.1)


def _scale(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1024 else f"{x / 1024:g}k"))


def _columns(
    points: Sequence[_Point], of: Callable[[_Point], Estimate | None], where: Callable[[_Point], float]
) -> tuple[np.ndarray, ...]:
    """Return positions, values and standard errors of the points with an estimate; an unknown error becomes 0."""
    known = [(where(point), estimate) for point in points if (estimate := of(point)) is not None]
    columns = [(x, estimate.value, estimate.standard_error or 0.0) for x, estimate in known]
    return tuple(np.array(columns, float).reshape(-1, 3).T)
