"""Settings of an experiment: the base recipe, arms that change it, seeds, and the measurements."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from bst_base.settings import Config
from bst_base.shipped import RECIPES
from bst_dist.study.runs.config import Settings, StudyConfig, load_study, require_distinct


class MeasureConfig(Config):
    """Measurements of finished runs. Each entry adds one or more columns to the table."""

    validation: bool = True
    """Bits per byte of the run's last evaluation, on sequences of the training length."""
    task: bool = False
    """For synthetic tasks: accuracy and nats per label of the run's last evaluation. Set `validation` to false."""
    task_beyond: int | None = Field(None, ge=1)
    """With `task`: the same, but only for labels whose answer is at least this many tokens back (a power of two)."""
    lengths: list[int] = Field(default_factory=list)
    """Bits per byte of a model that forgets after this many tokens, for each of these lengths (multiples of
    model.block). All lengths predict the same tokens of the validation documents."""
    tokens: int | None = Field(None, ge=1)
    """Maximum number of tokens that `lengths` reads; null: all validation documents."""
    speed: bool = False
    """Throughput in tokens per second (of the median step, and of the fastest tenth of the steps) and peak memory per
    rank."""
    time_to: float | None = Field(None, gt=0)
    """Target loss in bits per byte: measure the tokens and the time until the run's evaluations reach it."""

    @model_validator(mode="after")
    def _lengths_are_usable(self) -> MeasureConfig:
        require_distinct("lengths", self.lengths)
        if any(length < 1 for length in self.lengths):
            raise ValueError("lengths must be positive")
        if self.task_beyond is not None and not self.task:
            raise ValueError("task_beyond is for synthetic tasks: set task too")
        if self.task_beyond is not None and self.task_beyond & (self.task_beyond - 1):
            raise ValueError(f"task_beyond {self.task_beyond} is not a power of two: distances are counted by octaves")
        if not (self.validation or self.task or self.lengths or self.speed or self.time_to):
            raise ValueError("nothing is measured: set validation, task, lengths, speed or time_to")
        return self


class ExperimentConfig(StudyConfig):
    question: str
    """The question to answer, in one line: the title of the table."""
    conditions: dict[str, Settings] = Field(default_factory=lambda: {"": {}}, min_length=1)
    """Settings under which all arms are trained once more (windows, lengths). Arms are compared within a condition."""
    arms: dict[str, Settings] = Field(min_length=1)
    """Arms to compare: names with recipe settings. All arms of a condition train on the same number of tokens."""
    reference: str
    """The arm that the others are compared with."""
    measure: MeasureConfig = MeasureConfig()
    directory: Path = Path("runs/experiments")
    """Where runs and tables are written. Experiments in one directory share runs with the same recipe."""

    @model_validator(mode="after")
    def _names_exist(self) -> ExperimentConfig:
        if self.reference not in self.arms:
            raise ValueError(f"reference {self.reference!r} is not among the arms: {', '.join(self.arms)}")
        return self

    @property
    def results(self) -> Path:
        """Where the table and the figure are written."""
        return self.directory / self.name


def load_experiment(path: Path, overrides: list[str]) -> ExperimentConfig:
    """Read an experiment's file and apply the overrides; raises ConfigError for any error in them."""
    return load_study(ExperimentConfig, path, RECIPES, overrides)
