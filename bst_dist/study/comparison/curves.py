"""Draw the training curves of one or several runs against the tokens they have seen.

    bst plot runs/demo
    bst plot runs/demo runs/sliding --out curves.pdf

Draws bits per byte in training and evaluation (nats per label for classifiers), learning rate, gradient norm and
throughput. The suffix of --out decides the format: png, pdf or svg. `bst compare --plot` also draws them over time, and
their differences.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from bst_base.arguments import picture
from bst_base.errors import UserError
from bst_base.terminal import say
from bst_dist.report.metrics import FILE
from bst_dist.study.report.style import GREY, INCHES, looks, save
from bst_dist.study.runs.results import Result, read_result, shortest_names

SMALL = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm, before clipping",
    "tokens_per_s": "tokens per second",
}


def draw(runs: dict[str, Result]) -> Figure:
    """Return the figure for runs by name, each with at least one training step.

    Runs have different colours. Lines are training, dots are validation.
    """
    figure = Figure(figsize=INCHES, layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.8, 1))
    loss = figure.add_subplot(grid[0, :])
    small = {key: figure.add_subplot(grid[1, column]) for column, key in enumerate(SMALL)}
    text = any(np.isfinite(line["bits_per_byte"]) for run in runs.values() for line in run.train)
    quantity = "bits_per_byte" if text else "loss_nats"
    for look, run in zip(looks(len(runs)), runs.values(), strict=True):
        smoothed(loss, *series(run.train, quantity), look)
        evaluations(loss, run.evaluations, {line["step"]: line["tokens"] for line in run.train}, look, quantity)
        small["learning_rate"].plot(*series(run.train, "learning_rate"), **look)
        smoothed(small["gradient_norm"], *series(run.train, "gradient_norm"), look)
        smoothed(small["tokens_per_s"], *series(run.warm, "tokens_per_s"), look)
    _finish(loss, small)
    loss.set_ylabel("bits per byte" if text else "nats per label")
    figure.supxlabel("tokens seen" if text else "labels seen", fontsize=8)
    legend(loss, runs)
    return figure


def legend(axes: Axes, names: Collection[str]) -> None:
    """Add a legend with the names of the runs, and with the line and the dot for training and validation."""
    handles = [Line2D([], [], **look) for look in looks(len(names))]
    handles += [Line2D([], [], color=GREY), Line2D([], [], color=GREY, marker="o", linestyle="")]
    axes.legend(handles, [*names, "training", "validation"], loc="upper right", ncols=1 + len(names) // 5)


def series(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens seen and the value of `key`, for each line of metrics."""
    return np.array([line["tokens"] for line in lines]), np.array([line[key] for line in lines], float)


def smoothed(axes: Axes, where: np.ndarray, values: np.ndarray, look: dict[str, str]) -> None:
    """Draw each step as a faint line, and a running mean over a twenty-fifth of the run."""
    reach = len(values) // 50
    axes.plot(where, values, color=look["color"], alpha=0.25, linewidth=0.5)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values) - reach)
    around = np.minimum(index, reach)  # a centred window, narrower at the beginning, where the curve is steep
    axes.plot(where[index], (sums[index + around + 1] - sums[index - around]) / (2 * around + 1), **look)


def evaluations(
    axes: Axes,
    lines: list[dict[str, Any]],
    where: Mapping[int, float],
    look: dict[str, str],
    quantity: str = "bits_per_byte",
) -> None:
    """Draw a dot for each evaluation. `where` maps a step to its position on the x axis.

    The `tokens` of an evaluation line are not the position: they count the tokens that the evaluation read.
    """
    seen = {0: 0.0, **where}
    dots = [(seen[line["step"]], line[quantity]) for line in lines if line["step"] in seen and quantity in line]
    if dots:
        axes.plot(
            *zip(*dots, strict=True),
            "o",
            color=look["color"],
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )


def _finish(loss: Axes, small: dict[str, Axes]) -> None:
    """Set titles and scales."""
    small["learning_rate"].yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    for key, axes in small.items():
        axes.set_title(SMALL[key])
        axes.set_ylim(bottom=0)
        if key == "tokens_per_s":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (loss, *small.values()):
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(8 if axes is loss else 4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def read_runs(directories: list[Path]) -> dict[str, Result]:
    """Read the metrics of runs, by name; raises UserError for a run without training steps."""
    found = {name: read_result(path) for name, path in shortest_names(directories).items()}
    for run in found.values():
        if not run.train:
            raise UserError(f"{run.directory}: nothing to draw: {FILE} is missing there or holds no training step")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=picture,
        help="the file to draw (default: curves.png in the first run's directory)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    runs = read_runs(args.runs)
    out = args.out or args.runs[0] / "curves.png"
    save(lambda: draw(runs), out)
    say(f"drew {', '.join(runs)} to {out}")
    return {"file": str(out), "runs": {name: run.lines[-1]["step"] for name, run in runs.items()}}
