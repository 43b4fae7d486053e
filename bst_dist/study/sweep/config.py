"""What a sweep is: a base recipe, the axes it is varied along, the rules by size, and a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from bst_base.settings import Config, load
from bst_base.shipped import SWEEPS, find
from bst_dist.study.runs.recipes import Settings, with_recipe


class ShapeConfig(Config):
    """What stays in proportion when width and depth change."""

    head_width: int = Field(64, ge=1)
    """Width of a head; every width is a multiple of it."""
    ffn_ratio: float = Field(4.0, gt=0)
    """Width of the feed-forward network over the model's, about: it is chosen so that sizes are equal."""
    fraction: float = Field(0.5, gt=0, le=1)
    """Share of the layers that are the layer under study, spread evenly."""
    tolerance: float = Field(0.01, gt=0, le=0.02)
    """How far apart the sizes of the models that are compared may be, as a share of them."""


class RulesConfig(Config):
    """Hyperparameters as functions of the size N alone, so that no depth is favoured; N0 is the smallest size."""

    parametrisation: Literal["standard", "completep"] | None = None
    """completep: the recipe's rates hold at the baseline's shape of the smallest size and depth, and are carried to all
    others by CompleteP; standard: one rate for all; null: what the recipe says (model.parametrisation)."""
    rate_exponent: float = Field(0.0, ge=0)
    """The learning rate is the base recipe's times (N / N0) to the minus this."""
    batch_exponent: float = Field(0.0, ge=0)
    """Sequences a step are the base recipe's times (N / N0) to this."""
    warmup_fraction: float = Field(0.1, ge=0, lt=0.5)
    """Warm-up as a share of the shortest branch."""
    decay_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of its steps that each branch decays over."""

    @model_validator(mode="after")
    def _one_rule_for_the_rate(self) -> RulesConfig:
        if self.parametrisation == "completep" and self.rate_exponent:
            raise ValueError("under completep one rate holds for all sizes: leave out rate_exponent")
        return self


class BudgetConfig(Config):
    """What may be spent; one of the three units, or none for a sweep without a limit."""

    flops: float | None = Field(None, gt=0)
    """Training FLOPs."""
    gpu_hours: float | None = Field(None, gt=0)
    """Hours of one accelerator."""
    cpu_minutes: float | None = Field(None, gt=0)
    """Minutes of one core."""
    flops_per_s: float | None = Field(None, gt=0)
    """Training FLOP/s that a device achieves, where nothing has been measured: its peak times the utilisation."""
    start_s: float = Field(8.0, ge=0)
    """Seconds that a run takes beside its steps: start, checkpoint, evaluation."""

    @model_validator(mode="after")
    def _one_unit(self) -> BudgetConfig:
        given = [name for name in ("flops", "gpu_hours", "cpu_minutes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a budget has one unit, not {' and '.join(given)}")
        return self


class NoiseConfig(Config):
    """What is expected of the noise in ln of the loss, to predict standard errors before anything is spent."""

    seed: float = Field(0.007, gt=0)
    """Standard deviation between runs that differ in their seed alone; on miniatures 0.006 to 0.008."""
    within: float = Field(0.3, ge=0, le=1)
    """Share of the variance that points of one trunk do not have in common."""


class AuditConfig(Config):
    """Is the learning rate right in the corners of the grid? Without that, a claim about depth is confounded by it."""

    factors: tuple[float, ...] = ()
    """Other learning rates to try there, as multiples of the rule's: [0.5, 2]; empty: no audit."""
    seeds: int = Field(2, ge=2)
    """How many of the sweep's seeds it is made with: one run cannot tell a valley from noise."""


class SweepConfig(Config):
    name: str = Field(pattern=r"^[\w.-]+$")
    """What the sweep is called."""
    recipe: str
    """The base recipe: a YAML file, from the sweep's own directory."""
    directory: Path | None = None
    """Where everything is written; null: runs/sweeps/<name>."""
    settings: Settings = Field(default_factory=dict)
    """Settings of the base recipe that all runs have otherwise."""
    architectures: dict[str, Settings]
    """What is compared: a name and its settings."""
    baseline: str
    """The architecture that the others are compared with."""
    kernels: dict[str, Settings] = Field(default_factory=dict)
    """Kernels, each crossed with every architecture that has a state space model; empty: the recipe's own."""
    arms: dict[str, Settings] = Field(min_length=1)
    """Settings under which the whole grid is run again: lengths, windows. The verdict is within the first arm; others
    are shown in contrast. Where depths differ there must be one in which a stack of windows sees the whole sequence at
    every depth, and one in which it never sees more than a quarter."""
    sizes: list[float] = Field(min_length=1)
    """Sizes N: training FLOPs per token / 6."""
    depths: list[int] = Field(min_length=1)
    """Numbers of layers, each at every size by an equal-size shape."""
    only: list[tuple[float, int]] = Field(default_factory=list)
    """Pairs of size and depth to run in place of all; a grid that is not crossed is checked for confounding."""
    tokens_per_parameter: list[float] = Field(min_length=1)
    """Lengths of the runs: compute is 6 N^2 times this, the same for every architecture and depth of a size."""
    seeds: list[int] = Field(min_length=1)
    """Of weights and order of the data."""
    hold_out: list[float] = Field(default_factory=list)
    """Sizes that are run, and left out of fits and comparisons, to be predicted."""
    shape: ShapeConfig = ShapeConfig()
    rules: RulesConfig = RulesConfig()
    budget: BudgetConfig = BudgetConfig()
    noise: NoiseConfig = NoiseConfig()
    audit: AuditConfig = AuditConfig()
    retries: int = Field(1, ge=0)
    """How often a run that failed is started again; a diverged run is not, and memory that runs out is no failure."""

    @model_validator(mode="after")
    def _names_exist(self) -> SweepConfig:
        if self.baseline not in self.architectures:
            raise ValueError(f"baseline {self.baseline!r} is not among the architectures")
        for name in ("sizes", "depths", "tokens_per_parameter", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds a value twice")
        if self.audit.factors and len(self.seeds) < self.audit.seeds:
            raise ValueError(
                f"the audit needs {self.audit.seeds} seeds (audit.seeds) and the sweep has {len(self.seeds)}"
            )
        return self

    @property
    def arm(self) -> str:
        """Within which the verdict is given."""
        return next(iter(self.arms))

    @property
    def root(self) -> Path:
        """The sweep's directory."""
        return self.directory or Path("runs") / "sweeps" / self.name


def load_sweep(path: Path, overrides: list[str]) -> SweepConfig:
    """Read a sweep; its base recipe is found from its own directory. Raises ConfigError for whatever is wrong."""
    path = find(path, SWEEPS)
    return with_recipe(load(SweepConfig, path, overrides), path)
