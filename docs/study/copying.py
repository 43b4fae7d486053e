"""The analysis of copying by depth: whether the advantage of a state falls at depths where the windows reach the lag.

diagnostics.py uses this module. The registered page predicts in words that the advantage falls, and this module defines
how the fall is measured. It was written and tested on simulated accuracies before any result of copying was read.

The advantage of an arm is its accuracy minus that of the reference with the same seed. The fall at a lag is the mean
advantage at the depths where a stack of windows does not reach the source token, minus the mean at the depths where it
does. The fall is the mean over the lags that have both kinds of depth. Its 95 % interval is Student's t over seeds:
with two seeds it is 12.7 standard errors to each side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from bst_dist.study.report.style import GREY, marked, panels


@dataclass(frozen=True)
class Cell:
    """A condition with all runs done."""

    lag: int
    depth: int
    hidden: bool
    """Whether the source token of the label is beyond the reach of a stack of windows."""
    accuracy: dict[str, np.ndarray]
    """Arm -> accuracy of each seed, (seeds,)."""


def answer(cells: Sequence[Cell], reference: str, unfinished: Sequence[int] = ()) -> Iterator[str]:
    """Yield one line per arm on whether its advantage falls, and a table of accuracies by lag and depth.

    `unfinished` are the lags with an unfinished condition. As long as there are any, no verdict is given, because it
    could still change.
    """
    arms = [arm for arm in cells[0].accuracy if arm != reference]
    for arm in arms:
        yield f"- {_verdict(cells, arm, reference, unfinished)}"
    yield ""
    depths = sorted({cell.depth for cell in cells})
    yield f"| accuracy at lag | arm | {' | '.join(f'{depth} layers' for depth in depths)} |"
    yield f"| --- | --- | {' | '.join('---' for _ in depths)} |"
    by_place = {(cell.lag, cell.depth): cell for cell in cells}
    for lag in sorted({cell.lag for cell in cells}):
        row = [by_place.get((lag, depth)) for depth in depths]
        for arm in (reference, *arms):
            yield f"| {lag} | {arm} | {' | '.join(_level(cell, arm) for cell in row)} |"
        for arm in arms:
            shown = ("" if cell is None else _signed(_gain(cell, arm, reference)) for cell in row)
            yield f"| {lag} | {arm} minus {reference} | {' | '.join(shown)} |"
    yield ""
    yield "± is the standard error over seeds; † where the stack of windows does not reach the source token."


def _verdict(cells: Sequence[Cell], arm: str, reference: str, unfinished: Sequence[int]) -> str:
    name = f"advantage of `{arm}` over `{reference}`"
    if unfinished:
        missing = " and ".join(f"lag {lag}" for lag in unfinished)
        return f"**No answer yet** about the {name}: runs of {missing} are missing."
    crossed = _crossed(cells)
    beyond, within = (_over(crossed, hidden, lambda cell: _gain(cell, arm, reference)) for hidden in (True, False))
    low, high = interval(beyond - within)
    says = "Falls" if low > 0 else "Does not fall" if high < 0 else "Undecided"
    levels = "; ".join(f"of `{one}` {_level_on_both_sides(crossed, one)}" for one in (reference, arm))
    return (
        f"**{says}**: the {name} is {_signed(beyond)} where the stack of windows does not reach the source token "
        f"and {_signed(within)} where it does: a decrease of {_plain(beyond - within)} (95 % interval {low:+.2f} "
        f"to {high:+.2f}; negative: an increase). Accuracy beyond reach and within reach: {levels}."
    )


def _level_on_both_sides(cells: Sequence[Cell], arm: str) -> str:
    means = (_over(cells, hidden, lambda cell: cell.accuracy[arm]).mean() for hidden in (True, False))
    return " and ".join(f"{mean:.2f}" for mean in means)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean over seeds by Student's t; infinite with one seed."""
    if len(values) < 2:
        return -np.inf, np.inf
    half = float(stats.t.ppf(0.975, len(values) - 1)) * _error(values)
    return float(values.mean()) - half, float(values.mean()) + half


def _crossed(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of the lags that are within reach at one depth and beyond it at another."""
    reached = {hidden: {cell.lag for cell in cells if cell.hidden is hidden} for hidden in (True, False)}
    return [cell for cell in cells if cell.lag in reached[True] & reached[False]]


def _over(cells: Sequence[Cell], hidden: bool, value: Callable[[Cell], np.ndarray]) -> np.ndarray:
    """Return the mean over lags of the mean of `value` over depths beyond reach (`hidden`) or within it; (seeds,)."""
    own: dict[int, list[np.ndarray]] = {}
    for cell in cells:
        if cell.hidden is hidden:
            own.setdefault(cell.lag, []).append(value(cell))
    return np.mean([np.mean(values, axis=0) for values in own.values()], axis=0)


def _gain(cell: Cell, arm: str, reference: str) -> np.ndarray:
    return cell.accuracy[arm] - cell.accuracy[reference]


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _level(cell: Cell | None, arm: str) -> str:
    return "" if cell is None else _plain(cell.accuracy[arm]) + (" †" if cell.hidden else "")


def _plain(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {_error(values):.3f}"


def _signed(values: np.ndarray) -> str:
    return f"{values.mean():+.3f} ± {_error(values):.3f}"


def draw(cells: Sequence[Cell], chance: float) -> Figure:
    """Return the figure of accuracy over depth, one panel per lag, with errors over seeds.

    The background is grey beyond the reach of the stack of windows.
    """
    lags, arms = sorted({cell.lag for cell in cells}), list(cells[0].accuracy)
    figure, every = panels(len(lags), 2.4, sharey=True)
    for axes, lag in zip(every, lags, strict=False):
        own = sorted((cell for cell in cells if cell.lag == lag), key=lambda cell: cell.depth)
        depths = [cell.depth for cell in own]
        for number, arm in enumerate(arms):
            shift = 2 ** ((number - (len(arms) - 1) / 2) / 12)  # so that the marks do not overlap
            axes.errorbar(
                [depth * shift for depth in depths],
                [cell.accuracy[arm].mean() for cell in own],
                [_error(cell.accuracy[arm]) for cell in own],
                capsize=2,
                markersize=4,
                **marked(number),
            )
        for cell in own:
            if cell.hidden:
                axes.axvspan(cell.depth / 2**0.4, cell.depth * 2**0.4, color=GREY, alpha=0.15, linewidth=0)
        axes.axhline(chance, color=GREY, linestyle=":", linewidth=0.8)
        axes.set(xscale="log", xlabel="layers", ylim=(0, 1.04), title=f"lag {lag}")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
    every[0].set_ylabel("accuracy")
    handles = [every[0].plot([], [], **marked(number))[0] for number in range(len(arms))]
    figure.legend(handles, arms, loc="outside upper center", ncols=len(arms))
    return figure
