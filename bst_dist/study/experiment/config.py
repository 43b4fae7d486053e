"""What an experiment is: a base recipe, arms that differ from it, seeds, and what is measured afterwards."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from bst_base.settings import Config, load
from bst_base.shipped import RECIPES, find
from bst_dist.study.runs.recipes import Settings, with_recipe


class MeasureConfig(Config):
    """What is looked at once a run is done; each entry is a column of the table."""

    validation: bool = True
    """Bits per byte of the run's own last evaluation: sequences of the training length."""
    task: bool = False
    """Accuracy, and nats per label, of the run's own last evaluation of a synthetic task; set `validation` to false."""
    lengths: list[int] = Field(default_factory=list)
    """Bits per byte by evaluation length: the model forgets after so many tokens, a multiple of the block. All lengths
    predict the same tokens of the validation documents (`bst_dist.study.lengths.measure`)."""
    tokens: int | None = Field(None, ge=1)
    """How many tokens `lengths` reads at most; null: all of the validation documents."""
    speed: bool = False
    """Tokens a second (the median step, and the fastest tenth of them) and the most memory that a rank has held."""
    time_to: float | None = Field(None, gt=0)
    """A loss in bits per byte: the tokens and the time until the run's own evaluations reach it."""

    @model_validator(mode="after")
    def _lengths_are_usable(self) -> MeasureConfig:
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError("lengths holds a value twice")
        if any(length < 1 for length in self.lengths):
            raise ValueError("lengths must be positive")
        if not (self.validation or self.task or self.lengths or self.speed or self.time_to):
            raise ValueError("nothing is measured: set validation, task, lengths, speed or time_to")
        return self


class ExperimentConfig(Config):
    name: str = Field(pattern=r"^[\w.-]+$")
    """What the experiment is called."""
    question: str
    """What it is to answer, in one line: the title of its table."""
    recipe: str
    """The base recipe: a YAML file, from the experiment's own directory."""
    settings: Settings = Field(default_factory=dict)
    """Dotted settings of the base recipe that all runs have otherwise."""
    conditions: dict[str, Settings] = Field(default_factory=lambda: {"": {}}, min_length=1)
    """Settings under which all arms are run again: windows, lengths. Arms are compared within a condition."""
    arms: dict[str, Settings] = Field(min_length=1)
    """What is compared: a name and its dotted settings. All arms of a condition train on equally many tokens."""
    reference: str
    """The arm that the others are compared with."""
    seeds: list[int] = Field(min_length=1)
    """Seeds of weights and order; with several, errors are over seeds and differences are paired by seed."""
    measure: MeasureConfig = MeasureConfig()
    directory: Path = Path("runs/experiments")
    """Where runs and tables are written. Experiments in one directory share the runs that they have in common."""
    retries: int = Field(1, ge=0)
    """How often a run that failed is started again; a diverged run is not."""

    @model_validator(mode="after")
    def _names_exist(self) -> ExperimentConfig:
        if self.reference not in self.arms:
            raise ValueError(f"reference {self.reference!r} is not among the arms: {', '.join(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds holds a value twice")
        return self

    @property
    def results(self) -> Path:
        """Where the table and the figure are written."""
        return self.directory / self.name


def load_experiment(path: Path, overrides: list[str]) -> ExperimentConfig:
    """Read an experiment; its base recipe is found from its own directory. Raises ConfigError for whatever is wrong."""
    path = find(path, RECIPES)
    return with_recipe(load(ExperimentConfig, path, overrides), path)
