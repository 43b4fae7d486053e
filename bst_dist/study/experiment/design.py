"""The runs of an experiment: every arm under every condition with every seed, each a complete recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bst_base.settings import ConfigError
from bst_dist.config import recipe_settings
from bst_dist.study.experiment.config import ExperimentConfig
from bst_dist.study.runs.recipes import Job, digest, name_by_hash, with_settings
from data_pipeline.serve.loader import open_corpora
from data_pipeline.synthetic.config import SyntheticConfig


@dataclass(frozen=True)
class Trial(Job):
    """One run of an experiment."""

    condition: str
    arm: str
    seed: int

    @property
    def group(self) -> str:
        return f"{self.condition}: {self.arm}" if self.condition else self.arm


def trials(experiment: ExperimentConfig) -> list[Trial]:
    """Return all runs in training order.

    Conditions come one after the other, so that the first is complete early. Within a condition, seeds come one after
    the other, so that a temporarily slow machine slows all arms equally. Raises ConfigError for settings that make no
    valid recipe, for arms with the same recipe, and for arms of one condition with different numbers of tokens.
    """
    base = with_settings(recipe_settings(experiment.recipe), experiment.settings)
    found = [
        _trial(base, experiment, condition, arm, seed)
        for condition in experiment.conditions
        for seed in experiment.seeds
        for arm in experiment.arms
    ]
    for condition in experiment.conditions:
        _require_comparable([trial for trial in found if trial.condition == condition], experiment)
    _require_measurable(found, experiment)
    return found


def require_corpora(found: list[Trial]) -> None:
    """Raise UserError if a corpus of the runs cannot be read. Synthetic tasks have no corpus."""
    for data in {trial.recipe.data.model_dump_json(): trial.recipe.data for trial in found}.values():
        for split in ("train", "validation") if data.urls() else ():
            open_corpora(data, split)


def _trial(base: dict[str, Any], experiment: ExperimentConfig, condition: str, arm: str, seed: int) -> Trial:
    where = f"{experiment.name}, arm {arm}" + (f" under {condition}" if condition else "")
    try:
        data = with_settings(with_settings(base, experiment.conditions[condition]), experiment.arms[arm])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    data["seed"] = seed
    label = "".join(c if c.isalnum() or c in "._-" else "-" for c in arm)
    return Trial(name_by_hash(f"{label}-s{seed}", data, where), None, condition, arm, seed)


def _require_comparable(found: list[Trial], experiment: ExperimentConfig) -> None:
    """Raise ConfigError unless the arms have different recipes and train on the same number of tokens."""
    tokens = {trial.arm: trial.tokens for trial in found}
    if len(set(tokens.values())) > 1:
        listed = ", ".join(f"{arm} {number:,}" for arm, number in tokens.items())
        raise ConfigError(
            f"{experiment.name}: the arms train on different numbers of tokens ({listed}): change train.steps or "
            "train.sequences until they agree"
        )
    recipes: dict[str, str] = {}
    for trial in found:
        if trial.seed == experiment.seeds[0]:
            text = digest(trial.recipe)
            if text in recipes:
                raise ConfigError(f"{experiment.name}: arms {recipes[text]} and {trial.arm} are the same recipe")
            recipes[text] = trial.arm


def _require_measurable(found: list[Trial], experiment: ExperimentConfig) -> None:
    """Raise ConfigError for measurements that are not possible with these runs."""
    measure = experiment.measure
    for trial in found:
        block, recipe = trial.recipe.model.block, trial.recipe
        synthetic = isinstance(recipe.data, SyntheticConfig)
        if synthetic and (measure.validation or measure.lengths or measure.time_to is not None):
            raise ConfigError(
                f"{experiment.name}: a synthetic task has no text: set measure.task, not validation, lengths or time_to"
            )
        if measure.task and not synthetic:
            raise ConfigError(f"{experiment.name}: measure.task is for synthetic tasks (data.synthetic)")
        if bad := [length for length in measure.lengths if length % block]:
            raise ConfigError(f"{experiment.name}: measure.lengths {bad[0]} is not a multiple of the block, {block}")
        if measure.time_to is not None and not 0 < recipe.evaluation.every < recipe.train.steps:
            raise ConfigError(f"{experiment.name}: measure.time_to needs evaluations on the way (evaluation.every)")
        if measure.speed and recipe.log.every > recipe.train.steps:
            raise ConfigError(
                f"{experiment.name}: measure.speed needs log.every of at most train.steps, {recipe.train.steps}"
            )
