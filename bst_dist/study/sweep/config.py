"""Settings of a sweep: the base recipe, the axes of variation, rules that depend on the size, and the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from bst_base.settings import Config
from bst_base.shipped import SWEEPS
from bst_dist.study.runs.config import Settings, StudyConfig, load_study, require_distinct


class ShapeConfig(Config):
    """Proportions of the model that stay fixed when width and depth change."""

    head_width: int = Field(64, ge=1)
    """Width of a head; every model width is a multiple of it."""
    ffn_ratio: float = Field(4.0, gt=0)
    """Width of the feed-forward network divided by the model's width; swiglu has a third matrix, so it gets two thirds
    of that. The exact value is adjusted so that sizes are equal."""
    fraction: float = Field(0.5, gt=0, le=1)
    """Share of the layers that use the architecture's mixer, spread evenly; the others use model.filler."""
    tolerance: float = Field(0.01, gt=0, le=0.02)
    """Largest relative size difference between models that are compared."""


class RulesConfig(Config):
    """Hyperparameters as functions of the size N only, so that no depth has an advantage; N0 is the smallest size."""

    parametrisation: Literal["standard", "completep"] | None = None
    """completep: the recipe's learning rates apply to the baseline's shape of the smallest size and depth, and
    CompleteP scales them to all other shapes; standard: one learning rate for all; null: as in the recipe
    (model.parametrisation)."""
    rate_exponent: float = Field(0.0, ge=0)
    """The learning rate is the base recipe's times (N / N0)^-rate_exponent, where N0 is the smallest size."""
    batch_exponent: float = Field(0.0, ge=0)
    """The global batch is the base recipe's times (N / N0)^batch_exponent."""
    warmup_fraction: float = Field(0.1, ge=0, lt=0.5)
    """Warm-up steps, as a fraction of the shortest run's steps."""
    decay_fraction: float = Field(0.2, gt=0, lt=1)
    """Fraction of each run's steps during which the learning rate decays."""

    @model_validator(mode="after")
    def _one_rule_for_the_rate(self) -> RulesConfig:
        if self.parametrisation == "completep" and self.rate_exponent:
            raise ValueError("under completep, one learning rate holds for all sizes: leave out rate_exponent")
        return self


class BudgetConfig(Config):
    """The limit on the cost of the sweep, in one of three units. Without any of them there is no limit."""

    flops: float | None = Field(None, gt=0)
    """Limit in training FLOPs."""
    gpu_hours: float | None = Field(None, gt=0)
    """Limit in accelerator hours."""
    cpu_minutes: float | None = Field(None, gt=0)
    """Limit in minutes of one CPU core."""
    flops_per_s: float | None = Field(None, gt=0)
    """Training FLOP/s of a device (peak times utilisation), for shapes that `bst sweep plan --measure` has not
    measured."""
    start_s: float = Field(8.0, ge=0)
    """Seconds per run in addition to its steps: start, checkpoint, evaluation."""

    @model_validator(mode="after")
    def _one_unit(self) -> BudgetConfig:
        given = [name for name in ("flops", "gpu_hours", "cpu_minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a budget has one unit, not {' and '.join(given)}")
        return self


class NoiseConfig(Config):
    """Expected noise in ln(loss), to predict standard errors before anything is spent."""

    seed: float = Field(0.007, gt=0, le=1)
    """Standard deviation of ln(loss) between runs that differ only in their seed; about 0.007 in small models."""
    within: float = Field(0.3, ge=0, le=1)
    """Share of that variance that remains between runs with a common trunk."""


class AuditConfig(Config):
    """Checks the learning rate in the corners of the grid: a wrong one would bias every comparison between depths."""

    factors: tuple[float, ...] = ()
    """Learning rates to try in the corners of the grid, as multiples of the rule's rate: [0.5, 2]; empty: no audit."""
    seeds: int = Field(2, ge=2)
    """Number of the sweep's seeds that the audit uses."""
    arms: tuple[str, ...] = ()
    """Arms to audit; empty: all."""


class SweepConfig(StudyConfig):
    directory: Path | None = None
    """Where to write everything; null: runs/sweeps/<name>."""
    architectures: dict[str, Settings]
    """Architectures to compare: names, each with recipe settings that include model.mixer."""
    baseline: str
    """The architecture that the others are compared with."""
    kernels: dict[str, Settings] = Field(default_factory=dict)
    """SSM kernels, each combined with every architecture that has an SSM; empty: the recipe's own."""
    arms: dict[str, Settings] = Field(min_length=1)
    """Settings (lengths, windows) under which the whole grid is run again. The verdict comes from the first arm; the
    others are contrasted with it. If depths differ, one arm must let the stack of windows see the whole sequence at
    every depth, and one must never let it see more than a quarter."""
    sizes: list[float] = Field(min_length=1)
    """Sizes N, as training FLOPs per token / 6."""
    depths: list[int] = Field(min_length=1)
    """Numbers of layers. Every size is trained at every depth; the width follows from the two."""
    only: list[tuple[float, int]] = Field(default_factory=list)
    """Pairs of size and depth to run instead of all combinations. A grid in which size and depth vary together is an
    error."""
    tokens_per_parameter: list[float] = Field(min_length=1)
    """Run lengths in tokens per parameter: the compute of a run is 6 N^2 times this."""
    order: Literal["largest", "cheapest"] = "largest"
    """Which strata to train first. largest: keeps all workers busy to the end; cheapest: the smallest and shallowest
    first, for a machine that may be taken away before the sweep ends. You may change it at any time."""
    hold_out: list[float] = Field(default_factory=list)
    """Sizes to train but leave out of fits and comparisons. The report compares them with their prediction."""
    shape: ShapeConfig = ShapeConfig()
    rules: RulesConfig = RulesConfig()
    budget: BudgetConfig = BudgetConfig()
    noise: NoiseConfig = NoiseConfig()
    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _names_exist(self) -> SweepConfig:
        if self.baseline not in self.architectures:
            raise ValueError(f"baseline {self.baseline!r} is not among the architectures")
        for name in ("sizes", "depths", "tokens_per_parameter"):
            require_distinct(name, getattr(self, name))
        for name in self.audit.arms:
            if name not in self.arms:
                raise ValueError(f"audit.arms: {name!r} is not among the arms {', '.join(self.arms)}")
        if self.audit.factors and len(self.seeds) < self.audit.seeds:
            raise ValueError(
                f"the audit needs {self.audit.seeds} seeds (audit.seeds) and the sweep has {len(self.seeds)}"
            )
        return self

    @property
    def arm(self) -> str:
        """The first arm, within which the verdict is given."""
        return next(iter(self.arms))

    @property
    def root(self) -> Path:
        """The sweep's directory."""
        return self.directory or Path("runs") / "sweeps" / self.name


def load_sweep(path: Path, overrides: list[str]) -> SweepConfig:
    """Read a sweep's file and apply the overrides; raises ConfigError for any error in them."""
    return load_study(SweepConfig, path, SWEEPS, overrides)
