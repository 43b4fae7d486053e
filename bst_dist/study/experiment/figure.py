"""The figure of an experiment: one panel per unit, and one over the evaluation length if there are several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bst_dist.study.experiment.measure import Column
from bst_dist.study.experiment.table import Row, Table
from bst_dist.study.report.style import GREY, STYLE, marked, panels
from bst_dist.study.statistics import Estimate

HEIGHT = 2.6


def draw(table: Table) -> Figure | None:
    """Return the figure, or None if nothing is measured yet."""
    with matplotlib.rc_context(STYLE):
        return _draw(table)


def _draw(table: Table) -> Figure | None:
    rows = [row for row in table.rows if row.levels]
    families: dict[str, list[Column]] = {}
    for column in table.columns:
        if any(column.key in row.levels for row in rows):
            families.setdefault(column.family, []).append(column)
    if not families:
        return None
    conditions = list(dict.fromkeys(row.condition for row in rows))
    wanted = [
        (family, members, one)
        for family, members in families.items()
        for one in (conditions if family == "length" else [None])
    ]
    figure, every = panels(len(wanted), HEIGHT)
    for axes, (family, members, condition) in zip(every, wanted, strict=False):
        if family == "length":
            _by_length(axes, members, [row for row in rows if row.condition == condition], table)
            axes.set_title(condition or "")
        elif len(conditions) > 1:
            _by_condition(axes, members[0], rows, conditions, table)
        else:
            _by_arm(axes, members[0], rows, table)
    if len(conditions) > 1 or "length" in families:
        handles = [every[0].plot([], [], **_look(table, arm))[0] for arm in table.experiment.arms]
        figure.legend(handles, list(table.experiment.arms), loc="outside upper center", ncols=5)
    return figure


def _by_length(axes: Axes, members: Sequence[Column], rows: Sequence[Row], table: Table) -> None:
    lengths = {column.key: int(column.key.rpartition("_")[2]) for column in members}
    for row in rows:
        points = [(lengths[key], found) for key, found in row.levels.items() if key in lengths]
        _line(axes, points, row.arm, table)
    axes.set_xscale("log", base=2)
    ticks = sorted(lengths.values())
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("evaluation length, tokens")
    axes.set_ylabel("bits per byte")


def _by_condition(axes: Axes, column: Column, rows: Sequence[Row], conditions: list[str], table: Table) -> None:
    for arm in table.experiment.arms:
        points = [
            (conditions.index(row.condition), row.levels[column.key])
            for row in rows
            if row.arm == arm and column.key in row.levels
        ]
        _line(axes, points, arm, table)
    axes.set_xticks(range(len(conditions)), conditions)
    axes.set_title(column.family)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"))


def _by_arm(axes: Axes, column: Column, rows: Sequence[Row], table: Table) -> None:
    """Draw one line per arm: the mean with its error. Runs with the same seed are pairs, so thin lines join them."""
    shown = [row for row in rows if column.key in row.levels]
    for seed in table.experiment.seeds:
        runs = [
            (row.values[column.key][seed], place) for place, row in enumerate(shown) if seed in row.values[column.key]
        ]
        axes.plot(
            [x for x, _ in runs],
            [place for _, place in runs],
            "o-",
            color=GREY,
            alpha=0.4,
            markersize=2.5,
            linewidth=0.6,
        )
    for place, row in enumerate(shown):
        found, look = row.levels[column.key], _look(table, row.arm) | {"marker": "D"}
        axes.errorbar(found.value, place, xerr=_bar(found), **look, capsize=2)
    axes.set_yticks(range(len(shown)), [row.arm for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel(column.title)


def _line(axes: Axes, points: list[tuple[int, Estimate]], arm: str, table: Table) -> None:
    if points:
        where, found = zip(*points, strict=True)
        axes.errorbar(where, [f.value for f in found], yerr=list(map(_bar, found)), **_look(table, arm), capsize=2)


def _bar(found: Estimate) -> float:
    """Return the length of the error bar: the standard error over seeds, else 0.

    Errors over documents are not drawn, because the difficulty of the documents affects all arms alike.
    """
    return found.standard_error or 0.0 if found.over == "seeds" else 0.0


def _look(table: Table, arm: str) -> dict[str, Any]:
    return {**marked(list(table.experiment.arms).index(arm)), "markersize": 4, "linewidth": 1.1}
