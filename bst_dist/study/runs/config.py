"""The settings that sweeps and experiments share, and the reading of their files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from bst_base.settings import Config, ConfigError, load
from bst_base.shipped import find

T = TypeVar("T", bound="StudyConfig")
Settings = dict[str, Any]
"""Dotted settings of the recipe: {model.mixer: bst, model.context: {variant: SH}}."""


class StudyConfig(Config):
    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of the study."""
    recipe: str
    """The base recipe: a YAML file, relative to the folder of this file."""
    settings: Settings = Field(default_factory=dict)
    """Changes to the base recipe for all runs, by dotted name: {train.steps: 200}."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of the initial weights and of the data order. Runs with the same seed are compared in pairs."""
    retries: int = Field(1, ge=0)
    """How often to restart a run that failed. A run that diverged is not restarted; one that ran out of memory restarts
    with half the micro-batch, which does not count."""

    @model_validator(mode="after")
    def _seeds_differ(self) -> StudyConfig:
        require_distinct("seeds", self.seeds)
        return self


def require_distinct(name: str, values: Sequence[Any]) -> None:
    """Raise ValueError if a list of settings contains a value twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{name} holds a value twice")


def load_study(cls: type[T], path: Path, folder: str, overrides: Iterable[str]) -> T:
    """Read a study's file, given by its path or by its name in the shipped `folder`.

    `recipe` becomes the path of the base recipe. Raises ConfigError for any error in the file or the overrides, and if
    the base recipe does not exist.
    """
    path = find(path, folder)
    config = load(cls, path, overrides)
    recipe = path.parent / config.recipe
    if not recipe.is_file():
        raise ConfigError(f"{path}: recipe {config.recipe}: no such file beside it")
    return config.model_copy(update={"recipe": str(recipe)})
