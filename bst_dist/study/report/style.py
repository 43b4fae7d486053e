"""The style of all figures, and saving them: at the text width of a two-column paper, legible without colour."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bst_base.outputs import write_afterwards
from bst_base.terminal import say

# The colours of Okabe and Ito, which people with any colour vision can distinguish, the darker ones first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
GREY = "#777777"
"""Colour of aids to the reader: zero lines, the training length, elements common to all series."""
DASHES = ("-", "--", ":", "-.")  # the next style when all colours are used
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.1,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}
MARKS = "osD^vP*"
ACROSS = 3
"""Maximum number of panels per row of a figure."""
INCHES = (6.75, 4.4)  # the text width of a two-column paper


def looks(count: int) -> list[dict[str, str]]:
    """Return colours and dashes for `count` runs; up to 28 runs look different."""
    return [
        {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}
        for number in range(count)
    ]


def marked(number: int) -> dict[str, Any]:
    """Return the colour and mark of series `number`, with thin lines between its points."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)], "linewidth": 0.7}


def panels(number: int, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure with `number` panels, each `height` inches high, and its axes. Unused axes are switched off."""
    across = min(ACROSS, number)
    down = -(-number // across)
    figure = Figure(figsize=(INCHES[0], height * down + 0.3), layout="constrained")
    found = figure.subplots(down, across, squeeze=False, **shared).flatten().tolist()
    for axes in found[number:]:
        axes.set_axis_off()
    return figure, found


def save(draw: Callable[[], Figure], out: Path) -> None:
    """Draw the figure in STYLE and write the file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        draw().savefig(out)


def save_afterwards(args: argparse.Namespace, draw: Callable[[], Figure], out: Path) -> None:
    """Have the figure drawn and saved when the command's report is written, and its path printed."""

    def write() -> None:
        save(draw, out)
        say(f"drew {out}")

    write_afterwards(args, write)
