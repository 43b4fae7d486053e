"""Comparison of runs of one task: accuracies, and means over the seeds of a recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bst_base.errors import UserError
from bst_dist.config import NUMERIC_SECTIONS, Recipe
from bst_dist.study.lra.evaluate import Report, read_kept
from bst_dist.study.statistics import Estimate, mean
from bst_dist.train.rundir import read_recipe


@dataclass(frozen=True)
class Row:
    """One run."""

    run: str
    model: str
    seed: int
    report: Report
    recipe: str
    """The recipe without its seed, which is equal for runs that differ only in the seed."""


def rows(run_dirs: Sequence[Path], split: str) -> list[Row]:
    """Read the stored accuracies of runs.

    Raises UserError if one is missing, if their examples differ, or if two runs have the same recipe, seed and step.
    """
    found = [_row(run_dir, split) for run_dir in run_dirs]
    for other in found[1:]:
        if other.report.examples_sha256 != found[0].report.examples_sha256:
            raise UserError(
                f"{found[0].run} and {other.run}: evaluated on different examples, so their accuracies cannot be "
                "compared"
            )
    seen: dict[tuple[str, int, int], str] = {}
    for row in found:
        first = seen.setdefault((row.recipe, row.report.step, row.seed), row.run)
        if first is not row.run:
            raise UserError(
                f"{first} and {row.run}: the same recipe and seed after the same steps: give only one of them"
            )
    return found


def _row(run_dir: Path, split: str) -> Row:
    recipe = read_recipe(run_dir)
    return Row(str(run_dir), describe(recipe), recipe.seed, read_kept(run_dir, split), _without_seed(recipe))


def describe(recipe: Recipe) -> str:
    """Return a short description of a model."""
    model = recipe.model
    found = dict.fromkeys(f"{name}-{model.context.variant}" if name == "bst" else name for name in model.mixers())
    return f"{' + '.join(found)}, {model.depth} x {model.width}"


def _without_seed(recipe: Recipe) -> str:
    data = recipe.model_dump(mode="json", include={*NUMERIC_SECTIONS, "evaluation"} - {"seed"})
    return json.dumps(data, sort_keys=True)


@dataclass(frozen=True)
class Mean:
    """The mean over runs of one recipe, after the same steps, that differ only in their seed."""

    model: str
    parameters: int
    step: int
    seeds: int
    accuracy_mean: Estimate
    """Mean accuracy, with its standard error over seeds."""


def means(found: Sequence[Row]) -> list[Mean]:
    """Return for each recipe and step the mean accuracy over its seeds, with the standard error over seeds."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in found:
        groups.setdefault((row.recipe, row.report.step), []).append(row)
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[Row]) -> Mean:
    accuracy = mean([row.report.accuracy for row in group], "seeds")
    return Mean(group[0].model, group[0].report.parameters, group[0].report.step, len(group), accuracy)
