"""Checks that a grid can answer the question: no factors that vary together, no proportions that drift with depth.

If depth and width vary together, no number of runs can separate their effects. An advantage may also shrink with depth
only because each layer extends the receptive field of the baseline, or because the models differ in size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.gap import Gaps
from bst_dist.study.laws.regression import RegressionError
from bst_dist.study.laws.verdict import MISMATCH, UNITS, Rule, columns, mismatch_over
from bst_dist.study.sweep.design import Run, of_grid, require_different

INFLATION = 10.0
"""The largest allowed variance inflation factor: the other columns may explain at most nine tenths of a column."""
BEYOND = 4
"""How many times the reach of a stack of windows a sequence must be, so that a layer with a state can help."""


class UnsoundError(UserError):
    """The grid cannot answer the question of the sweep."""


def require_sound(runs: Sequence[Run], baseline: str, arm: str) -> None:
    """Raise UnsoundError, with the reason and a remedy, unless the grid can separate its factors."""
    measured = of_grid(list(runs))
    require_different(measured)
    found = [*collinear(measured), *drifting(measured), *missing_arms(measured), *unequal(measured, baseline)]
    if not found:
        found = [*unanswerable(measured, baseline, arm)]
    if found:
        raise UnsoundError("\n".join(["the grid cannot answer:", *(f"  {line}" for line in found)]))


def planned_gaps(runs: Sequence[Run], baseline: str, arm: str) -> list[Gaps]:
    """Return the pairs that a grid will have, one entry per variant, with gaps of 0."""
    own = [run for run in of_grid(list(runs)) if run.cell.arm == arm]
    base = {(run.cell.stratum, run.multiple): run for run in own if run.cell.architecture == baseline}
    found = []
    for name in dict.fromkeys(run.cell.architecture for run in own if run.cell.architecture != baseline):
        mine = [run for run in own if run.cell.architecture == name and (run.cell.stratum, run.multiple) in base]
        pairs = [(run, base[run.cell.stratum, run.multiple]) for run in mine]
        zero = np.zeros(len(mine))
        found.append(
            Gaps(
                name,
                arm,
                zero,
                zero,
                mismatch=np.log([run.counts.parameters / other.counts.parameters for run, other in pairs]),
                flops=np.array([run.flops for run in mine]),
                depth=np.array([float(run.cell.depth) for run in mine]),
                tokens_per_parameter=np.array([run.tokens / run.counts.parameters for run in mine]),
                stratum=np.array([run.cell.stratum for run in mine]),
            )
        )
    return found


def collinear(runs: Sequence[Run]) -> list[str]:
    """Return a message for each factor of which the others explain more than nine tenths of the variance.

    The factors are size, depth and length, which determine everything else. If width and depth vary together, so do
    size and depth.
    """
    logs = {
        "size": np.log([run.cell.size for run in runs]),
        "depth": np.log([run.cell.depth for run in runs]),
        "tokens per parameter": np.log([run.multiple for run in runs]),
    }
    centred = {name: (v - v.mean()) / v.std() for name, v in logs.items() if np.ptp(v) > 0.05}
    if len(centred) < 2:
        return []
    names, matrix = list(centred), np.stack(list(centred.values()), axis=1)
    found = []
    for index, name in enumerate(names):
        others = np.delete(matrix, index, axis=1)
        shares = np.linalg.lstsq(others, matrix[:, index], rcond=None)[0]
        left = np.mean((matrix[:, index] - others @ shares) ** 2)
        if left * INFLATION < 1:
            guilty = [n for n, s in zip((n for n in names if n != name), shares, strict=True) if abs(s) > 0.3]
            found.append(
                f"{name} follows from {' and '.join(guilty)} ({1 - left:.0%} of its variance): "
                "cross them, so that each size has several depths and each depth several sizes"
            )
    return found


def drifting(runs: Sequence[Run]) -> list[str]:
    """Return a message for each proportion of an architecture that is not the same at every depth."""
    found = []
    for name in dict.fromkeys(run.cell.architecture for run in runs):
        own = [run for run in runs if run.cell.architecture == name]
        for what, value in PROPORTIONS.items():
            seen = {run.cell.depth: value(run) for run in own}
            if max(seen.values()) - min(seen.values()) > 1e-3 * max(map(abs, seen.values())):
                values = ", ".join(f"{seen[depth]:g} at {depth} layers" for depth in sorted(seen))
                found.append(f"{what} of {name} drifts with depth ({values}): {REMEDY.get(what, 'keep it fixed')}")
    return found


def missing_arms(runs: Sequence[Run]) -> list[str]:
    """Return a message for each missing arm of the two that a comparison of depths needs.

    A stack of windows sees depth x W tokens. In one arm this must be the whole sequence at the smallest depth, so that
    depth extends the reach of no model. In another arm it must be at most a quarter of the sequence at the largest
    depth, so that a state can help.
    """
    depths = sorted({run.cell.depth for run in runs})
    if len(depths) < 2:
        return []
    windows = {run.cell.arm: run.recipe.train.sequence_length / run.recipe.model.block for run in runs}
    told = ", ".join(f"{arm}: {blocks:g} windows per sequence" for arm, blocks in windows.items())
    found = []
    if not any(blocks <= depths[0] for blocks in windows.values()):
        found.append(
            f"the receptive field of a window stack grows with depth in every arm ({told}): an advantage may "
            "shrink for this reason alone; add an arm with train.sequence_length <= "
            f"{depths[0]} x model.block"
        )
    if not any(blocks >= BEYOND * depths[-1] for blocks in windows.values()):
        found.append(
            f"in every arm a window stack of {depths[-1]} layers sees more than a quarter of the sequence "
            f"({told}), so the sweep cannot show what a state adds; add an arm with train.sequence_length >= "
            f"{BEYOND * depths[-1]} x model.block"
        )
    return found


def unequal(runs: Sequence[Run], baseline: str) -> list[str]:
    """Return a message for each variant whose size relative to the baseline changes with a factor."""
    found = []
    for arm in dict.fromkeys(run.cell.arm for run in runs):
        for gaps in planned_gaps(runs, baseline, arm):
            _, names = columns(gaps)
            for factor in (name for name in names if name in UNITS):
                if abs(off := mismatch_over(gaps, factor)) > MISMATCH:
                    found.append(
                        f"the ratio of sizes, N of {gaps.variant} / N of {baseline}, changes by {off:+.1%} "
                        f"between the smallest and the largest {factor} (arm {arm}), which alone changes an "
                        "advantage at equal compute: use a smaller shape.head_width, or larger "
                        "sizes"
                    )
    return found


def unanswerable(runs: Sequence[Run], baseline: str, arm: str) -> list[str]:
    """Return a message for each reason why the analysis would fail: too few values, variants or pairs."""
    for what, values in (
        ("tokens_per_parameter", {run.multiple for run in runs}),
        ("sizes", {run.cell.size for run in runs}),
    ):
        if len(values) < 2:
            return [f"{what} has one value: no curve can be fitted, and no compute-equivalent gain read off; give two"]
    every = planned_gaps(runs, baseline, arm)
    if not every:
        return [f"there is nothing to compare {baseline} with: add an architecture"]
    try:
        untested = Rule(every, draws=1).untested
    except RegressionError as error:
        return [str(error)]
    return [f"{name}: {why}: add seeds, sizes or depths" for name, why in untested.items()]


def _fraction(run: Run) -> float:
    mixers = run.recipe.model.mixers()
    return mixers.count(run.recipe.model.mixer) / len(mixers)


PROPORTIONS = {
    "the share of layers under study": _fraction,
    "head width": lambda run: run.recipe.model.head,
    "context width / width": lambda run: (
        run.recipe.model.context.width(run.recipe.model.width) / run.recipe.model.width
    ),
    "states per block": lambda run: float(run.recipe.model.context.states),
}
REMEDY = {
    "the share of layers under study": "choose depths that shape.fraction divides into whole layers",
    "context width / width": "leave model.context.ssm_width to its default",
}
