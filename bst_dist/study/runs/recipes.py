"""Recipes of a study's runs: a base recipe with settings put in, named by its own hash.

A run's directory ends in the hash of its recipe, so studies that have a run in common train it once, and a run that
was trained otherwise is never taken for it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from bst_base.settings import ConfigError, parse
from bst_dist.config import Recipe
from bst_dist.study.runs.config import Settings


@dataclass(frozen=True)
class Job:
    """One run that a study asks for."""

    recipe: Recipe
    trunk: str | None
    """The run it branches off, which must be done before; None: it starts by itself."""

    @property
    def name(self) -> str:
        """Its directory: what it is, and the hash of its recipe."""
        return self.recipe.name

    @property
    def group(self) -> str:
        """What it is a run of: `status` counts by it."""
        raise NotImplementedError

    @property
    def work(self) -> float:
        """How much there is to compute, in any unit that the runs of a study have in common."""
        return self.tokens

    @property
    def steps(self) -> int:
        """That it takes itself."""
        return self.recipe.train.steps - (self.recipe.branch.step if self.recipe.branch else 0)

    @property
    def tokens(self) -> int:
        """That it has trained on in the end, those of its trunk included."""
        return self.recipe.train.tokens


def with_settings(data: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A copy of `data` with dotted settings put in; a section given as a mapping is merged.

    Raises ConfigError when a key goes through what is a value and no section.
    """
    data = copy.deepcopy(data)
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"setting {key!r}: {parent!r} is a value, not a section")
        both = isinstance(value, dict) and isinstance(node.get(leaf), dict)
        node[leaf] = {**node[leaf], **value} if both else copy.deepcopy(value)
    return data


def named(label: str, data: dict[str, Any], where: str | None = None) -> Recipe:
    """The recipe under its label and the hash of everything else in it.

    Raises ConfigError for what is wrong in it, beginning with `where` (by default the label).
    """
    recipe = parse(Recipe, {**data, "name": "unnamed"}, where=where or label)
    return recipe.model_copy(update={"name": f"{label}-{digest(recipe)}"})


def digest(recipe: Recipe) -> str:
    """Of everything in a recipe but its name, its number of ranks and what it logs."""
    text = json.dumps(recipe.model_dump(mode="json", exclude={"name", "paths_from", "ranks", "log"}), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
