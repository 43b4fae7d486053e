"""Recipes of a study's runs: a base recipe with changed settings, named by its hash.

The name of a run directory ends in the hash of its recipe. So a run that several studies share is trained once, and a
run with other settings is never mistaken for it.
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
    """The run that it branches from, which must be done first; None if it starts from initial weights."""

    @property
    def name(self) -> str:
        """Name of the run directory: a label and the hash of the recipe."""
        return self.recipe.name

    @property
    def group(self) -> str:
        """Group in which the command `status` counts the run."""
        raise NotImplementedError

    @property
    def work(self) -> float:
        """Amount of computation, in a unit that is the same for all runs of a study."""
        return self.tokens

    @property
    def steps(self) -> int:
        """Number of steps without those of its trunk."""
        return self.recipe.train.steps - (self.recipe.branch.step if self.recipe.branch else 0)

    @property
    def tokens(self) -> int:
        """Number of training tokens, including those of its trunk."""
        return self.recipe.train.tokens


def with_settings(data: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return a copy of `data` with dotted settings applied. A section given as a mapping is merged.

    Raises ConfigError if a parent in a dotted key is a value instead of a section.
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


def name_by_hash(label: str, data: dict[str, Any], where: str | None = None) -> Recipe:
    """Return the recipe, named by the label and its hash.

    Raises ConfigError for any error in it. The message begins with `where` (default: the label).
    """
    recipe = parse(Recipe, {**data, "name": "unnamed"}, where=where or label)
    return recipe.model_copy(update={"name": f"{label}-{digest(recipe)}"})


def digest(recipe: Recipe) -> str:
    """Return the hash of a recipe without its name, `paths_from`, number of ranks and `log` section."""
    text = json.dumps(recipe.model_dump(mode="json", exclude={"name", "paths_from", "ranks", "log"}), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
