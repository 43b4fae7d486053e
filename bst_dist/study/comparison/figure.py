"""The figure of `bst compare --plot`: the losses of runs over tokens and over time.

Below them are the difference of each run from the first one in training on the same batches, and the throughput.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bst_base.errors import UserError
from bst_dist.study.comparison.curves import evaluations, legend, series, smoothed
from bst_dist.study.comparison.pairs import by_step
from bst_dist.study.comparison.run_summary import RunSummary
from bst_dist.study.report.style import GREY, looks

INCHES = (6.75, 4.8)


def draw(runs: Mapping[str, RunSummary]) -> Figure:
    """Return the figure for runs by name; raises UserError for a run without training steps with bits per byte."""
    for one in runs.values():
        if not any(math.isfinite(line.get("bits_per_byte", math.nan)) for line in one.result.train):
            raise UserError(
                f"{one.result.directory}: nothing to draw: no training step with bits per byte has been reported"
            )
    figure = Figure(figsize=INCHES, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.5, 1))
    tokens, time = (figure.add_subplot(grid[0, column]) for column in range(2))
    difference, speed = (figure.add_subplot(grid[1, column]) for column in range(2))
    unit, seconds = _unit(runs)
    first = next(iter(runs.values()))
    for look, one in zip(looks(len(runs)), runs.values(), strict=True):
        _loss(tokens, one, np.array([line["tokens"] for line in one.result.train]), look)
        _loss(time, one, np.cumsum(one.result.step_times) / seconds, look)
        smoothed(speed, *series(one.result.warm, "tokens_per_s"), look)
        if one is not first and (steps := by_step(first, one)):
            values = np.array([two["bits_per_byte"] - before["bits_per_byte"] for before, two in steps])
            smoothed(difference, np.array([two["tokens"] for _, two in steps]), values, look)
    _finish(tokens, time, difference, speed, unit)
    legend(tokens, list(runs))
    return figure


def _loss(axes: Axes, one: RunSummary, where: np.ndarray, look: dict[str, str]) -> None:
    smoothed(axes, where, np.array([line["bits_per_byte"] for line in one.result.train]), look)
    steps = {line["step"]: float(place) for line, place in zip(one.result.train, where, strict=True)}
    evaluations(axes, one.result.evaluations, steps, look)


def _unit(runs: Mapping[str, RunSummary]) -> tuple[str, float]:
    """Return the name and the seconds of a suitable time unit for the longest run."""
    longest = max(one.result.time_s() for one in runs.values())
    return next(
        (name, size)
        for name, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("s", 1.0))
        if longest > 2 * size or size == 1.0
    )


def _finish(tokens: Axes, time: Axes, difference: Axes, speed: Axes, unit: str) -> None:
    """Set labels and scales."""
    tokens.set_ylabel("bits per byte")
    time.sharey(tokens)
    time.set_xlabel(f"time in training steps, {unit}")
    difference.set_title("bits per byte minus those of the first run, same batches")
    difference.axhline(0.0, color=GREY, linewidth=0.6)
    speed.set_title("tokens per second")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    if len(difference.lines) == 1:
        difference.text(0.5, 0.6, "no two runs read the same batches", ha="center", transform=difference.transAxes)
    for axes in (tokens, difference, speed):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("tokens seen")
    for axes in (tokens, time, difference, speed):
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
