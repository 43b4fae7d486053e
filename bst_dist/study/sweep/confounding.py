"""Whether a grid can answer the question: which columns of its design move together, and what drifts with depth.

A grid whose depth is tied to its width cannot tell one from the other, however many runs it has; and an advantage may
fall with depth only because the baseline sees further with every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.sweep.design import Cell, Run

INFLATION = 10.0
"""The largest variance inflation factor: a column of which nine tenths follow from the others is not settled."""


class ConfoundedError(UserError):
    """A grid that cannot tell its factors apart."""


def require_sound(runs: Sequence[Run]) -> None:
    """Raise ConfoundedError, saying which columns move together, unless the grid can separate its factors."""
    measured = [run for run in runs if run.cell.role == "grid" and run.multiple is not None]
    found = [*collinear(measured), *drifting(measured), *reach(measured)]
    if found:
        raise ConfoundedError("\n".join(["the grid is confounded:", *(f"  {line}" for line in found)]))


def design_columns(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """Logarithms of the factors of a grid's measurements, those that vary: name -> (n,)."""
    columns = {
        "compute": np.log([run.cell.size**2 * run.multiple for run in runs]),
        "depth": np.log([run.cell.depth for run in runs]),
        "tokens per parameter": np.log([run.multiple for run in runs]),
    }
    return {name: values for name, values in columns.items() if np.ptp(values) > 0.05}


def collinear(runs: Sequence[Run]) -> list[str]:
    """Columns that nine tenths of the variance of another follow from, and which those are.

    Looked at are size, depth and length, which decide everything else; with width and depth tied, size and depth are.
    """
    columns = {
        "size": np.log([run.cell.size for run in runs]),
        "depth": np.log([run.cell.depth for run in runs]),
        "tokens per parameter": np.log([run.multiple for run in runs]),
    }
    centred = {name: (v - v.mean()) / v.std() for name, v in columns.items() if np.ptp(v) > 0.05}
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
            found.append(f"{name} follows from {' and '.join(guilty)} ({1 - left:.0%} of its variance): "
                         "cross them, so that each size has several depths and each depth several sizes")  # fmt: skip
    return found


def drifting(runs: Sequence[Run]) -> list[str]:
    """Proportions that are not the same at every depth, by architecture."""
    found = []
    for name in dict.fromkeys(run.cell.architecture for run in runs):
        own = [run for run in runs if run.cell.architecture == name]
        for what, value in PROPORTIONS.items():
            seen = {run.cell.depth: value(run) for run in own}
            if max(seen.values()) - min(seen.values()) > 1e-3 * max(map(abs, seen.values())):
                values = ", ".join(f"{seen[depth]:g} at {depth} layers" for depth in sorted(seen))
                found.append(f"{what} of {name} drifts with depth ({values}): {REMEDY.get(what, 'keep it fixed')}")
    return found


def reach(runs: Sequence[Run]) -> list[str]:
    """Arms in which the baseline's receptive field grows with depth, unless one has the same at every depth.

    A stack of windows sees depth x W tokens: it must cover the sequence at the smallest depth, in one arm at least.
    """
    if len({run.cell.depth for run in runs}) < 2:
        return []
    seen: dict[str, dict[int, float]] = {}
    for run in runs:
        covered = run.cell.depth * run.recipe.model.block / run.recipe.train.sequence_length
        seen.setdefault(run.cell.arm, {})[run.cell.depth] = min(1.0, covered)
    if any(len(set(arm.values())) == 1 for arm in seen.values()):
        return []
    arm, shares = next(iter(seen.items()))
    values = ", ".join(f"{share:.0%} of the sequence at {depth} layers" for depth, share in sorted(shares.items()))
    return [
        f"the receptive field of a window stack grows with depth in every arm (arm {arm}: {values}): an advantage may "
        "shrink for that alone; add an arm with model.block x smallest depth >= train.sequence_length"
    ]


def _fraction(run: Run) -> float:
    mixers = run.recipe.model.mixers()
    return mixers.count(run.recipe.model.mixer) / len(mixers)


def blocks_of(cells: Sequence[Cell]) -> list[str]:
    """The blocks of some cells, in order."""
    return list(dict.fromkeys(cell.block for cell in cells))


PROPORTIONS = {
    "the share of layers under study": _fraction,
    "ffn / width": lambda run: run.recipe.model.ffn / run.recipe.model.width,
    "head width": lambda run: run.recipe.model.width / run.recipe.model.heads,
    "context width / width": lambda run: (
        run.recipe.model.context.width(run.recipe.model.width) / run.recipe.model.width
    ),
    "states a block": lambda run: float(run.recipe.model.context.states),
}
REMEDY = {
    "the share of layers under study": "choose depths that shape.fraction divides into whole layers",
    "context width / width": "leave model.context.ssm_width to its default",
}
