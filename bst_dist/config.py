"""The recipe: one YAML file with all settings of one run.

Each package declares its sections in its own config.py, which imports only other settings. This file composes them and
checks conditions between sections. Reading a recipe imports neither torch nor the code that the sections configure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from bst_base.places import NameOrPath, with_base, written
from bst_base.settings import Config, ConfigError, overridden, parse, read_settings
from bst_base.shipped import RECIPES, STRATEGIES, base_of, find
from bst_base.sizes import counted
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.faults.config import GuardConfig, WatchdogConfig
from bst_dist.model.config import ModelConfig
from bst_dist.model.masking import isolating_problem, masking_problem
from bst_dist.parallel.config import ParallelConfig, data_parallel
from bst_dist.report.config import LogConfig
from bst_dist.study.lra.config import LongRangeConfig
from bst_dist.train.config import (
    BranchConfig,
    EvaluationConfig,
    InitialWeightsConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.spread import Spread
from data_pipeline.synthetic.config import SyntheticConfig

if TYPE_CHECKING:
    from data_pipeline.serve.reader import Corpus


OBJECTIVES: dict[type[Config], str] = {
    DataConfig: "bst_dist.train.objective:LanguageModelling",
    LongRangeConfig: "bst_dist.study.lra.objective:Classification",
    SyntheticConfig: "bst_dist.study.synthetic:SyntheticObjective",
}
"""Type of the data section -> class of the run's objective (train/objective.py). The class is given by its import path,
so that training imports only the one that it needs."""


def _data_kind(section: Any) -> str:
    if not isinstance(section, dict):
        return {LongRangeConfig: "task", SyntheticConfig: "synthetic"}.get(type(section), "text")
    return next((kind for kind in ("task", "synthetic") if kind in section), "text")


class Recipe(Config):
    name: str = Field(pattern=r"^[\w.-]+$")
    """The run's name: its directory is runs/<name> unless --run-dir says otherwise."""
    paths_from: Path | None = None
    """Folder that relative paths in this recipe start from. Filled in by the program: the recipe's folder; for a file
    in launch/, the folder that holds launch/; for a recipe that comes with an installed bst, and when this is null, the
    working directory."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights and of the data order."""
    ranks: int | None = Field(None, ge=1, le=2**20)
    """Ranks that `bst train` starts on this machine; null: one per accelerator, or one if there is none."""
    model: ModelConfig
    data: Annotated[
        Annotated[DataConfig, Tag("text")]
        | Annotated[LongRangeConfig, Tag("task")]
        | Annotated[SyntheticConfig, Tag("synthetic")],
        Discriminator(_data_kind),
    ]
    """What the run learns from: the text of a corpus; with `synthetic`, computed sequences (data_pipeline/synthetic);
    with `task`, the classes of a task's examples (bst_dist/study/lra)."""
    train: TrainConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: NameOrPath = "zero1"
    """DeepSpeed strategy: the name of a file in ds_configs/, or the path of your own. The recipe fills in the rest."""
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    compile: bool | None = None
    """Compile the loss, and each layer into one graph, for training on CUDA. null: layers where possible (the run's
    header says); true: required, so where it is impossible the run ends with the reason; false: neither layers nor the
    loss. What was run on a GPU: docs/gpu.md."""
    deterministic: bool = False
    """On a GPU, compute the same bits at every start, with slower kernels that add in a fixed order. CPU training
    always does."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    branch: BranchConfig | None = None
    """Continue from another run's checkpoint, with its optimizer state and its place in the data; null: no."""
    initial_weights: InitialWeightsConfig | None = None
    """Start from another run's weights, for fine-tuning; null: from random weights."""
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _resolve_paths(cls, data: Any) -> Any:
        """Resolve relative paths from `paths_from`, so that they do not depend on the working directory."""
        if not isinstance(data, dict):
            return data
        return with_base(data, Path(data.get("paths_from") or Path.cwd()))

    @model_validator(mode="after")
    def _lengths_agree(self) -> Recipe:
        for step, length in self.train.lengths.changes:
            self._length_fits(step, length)
        if self.train.slice_tokens is not None:
            for length in self.train.lengths.values:
                self._slices_fit(self.train.slice_tokens, length)
        elif self.train.edges != "device" or self.train.edges_every != 1:
            field = "edges" if self.train.edges != "device" else "edges_every"
            raise ValueError(
                f"train.{field} {getattr(self.train, field)}: only slices have edges; set train.slice_tokens too"
            )
        return self

    @model_validator(mode="after")
    def _data_agrees(self) -> Recipe:
        if self.train.carry and self.data.mode != "streaming":
            needed = "data.row_tokens" if isinstance(self.data, SyntheticConfig) else "data.mode streaming"
            raise ValueError(f"train.carry needs {needed}: only there does a row continue from step to step")
        problems = {"masked": masking_problem, "isolated": isolating_problem}
        if (find := problems.get(self.data.documents)) and (problem := find(self.model)):
            raise ValueError(problem)
        if self.train.sequence_changes and not (isinstance(self.data, DataConfig) and self.data.mode == "shuffled"):
            raise ValueError("train.sequence_changes: only for text in shuffled mode")
        if isinstance(self.data, LongRangeConfig):
            self.data.require_fit(self.model, self.parallel)
            if self.train.z_loss:
                raise ValueError("train.z_loss: not available for classification tasks; leave it out")
        return self

    @model_validator(mode="after")
    def _optimizer_agrees(self) -> Recipe:
        if self.optimizer.kind == "muon" and self.model.parametrisation.kind != "standard":
            raise ValueError(
                "optimizer.kind muon: CompleteP's rates are derived for AdamW; set model.parametrisation.kind to "
                "standard, or optimizer.kind to adamw"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_agrees(self) -> Recipe:
        known = ["validation", *self.evaluation.corpora]
        if "validation" in self.evaluation.corpora:
            raise ValueError("evaluation.corpora.validation: this is the name of the run's own set; choose another")
        if self.checkpoint.keep_best_on not in known:
            raise ValueError(
                f"checkpoint.keep_best_on {self.checkpoint.keep_best_on!r}: not evaluated; choose {' or '.join(known)}"
            )
        if self.evaluation.corpora and not isinstance(self.data, DataConfig):
            raise ValueError("evaluation.corpora: this run does not train on text; leave it out")
        return self

    @model_validator(mode="after")
    def _start_agrees(self) -> Recipe:
        if self.branch and self.branch.step >= self.train.steps:
            raise ValueError(f"branch.step {self.branch.step} must be below train.steps, {self.train.steps}")
        if self.branch and self.initial_weights:
            raise ValueError("branch and initial_weights exclude each other: both set where the run starts")
        return self

    @model_validator(mode="after")
    def _can_roll_back(self) -> Recipe:
        for field in ("non_finite", "spike"):
            if getattr(self.guard, field) == "roll-back" and not (
                self.checkpoint.every or self.checkpoint.at or self.branch
            ):
                raise ValueError(
                    f"guard.{field} roll-back: with checkpoint.every 0 the run has no checkpoint before its last step; "
                    "set checkpoint.every"
                )
        return self

    @model_validator(mode="after")
    def _fits_synthetic(self) -> Recipe:
        if not isinstance(self.data, SyntheticConfig):
            return self
        task, length = self.data.synthetic, self.train.sequence_length
        row = self.data.row(length)
        if row % length:
            raise ValueError(f"data.row_tokens {row} is not a multiple of train.sequence_length {length}")
        if self.train.carry and row == length:
            raise ValueError(
                f"train.carry: rows of data.row_tokens {length} are read in one step, so there is nothing to carry"
            )
        if problem := task.problem(row):
            raise ValueError(f"data.synthetic: {problem}")
        size = self.model.vocab_size
        if size is not None and size < task.vocabulary:
            raise ValueError(
                f"model.vocab_size {size}: the task {task.task} has {task.vocabulary} tokens; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _has_the_vocabulary_of_its_task(self) -> Recipe:
        """Return the recipe with the vocabulary size of its synthetic task if it sets none.

        pydantic takes the returned recipe in place of this one when settings are parsed, but not in `Recipe(...)`.
        """
        if not isinstance(self.data, SyntheticConfig) or self.model.vocab_size is not None:
            return self
        return self.of_vocabulary(self.data.synthetic.vocabulary)

    def of_one_length(self, length: int) -> Recipe:
        """Return the recipe with this sequence length and no length changes."""
        train = self.train.model_copy(update={"sequence_length": length, "length_changes": ()})
        return self.model_copy(update={"train": train})

    def of_vocabulary(self, size: int) -> Recipe:
        """Return the recipe with this vocabulary size."""
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": size})})

    def _length_fits(self, step: int, length: int) -> None:
        unit = self.model.block * self.parallel.sp
        field = f"train.length_changes: step {step}: sequence_length" if step else "train.sequence_length"
        if length % unit:
            near = max(unit, round(length / unit) * unit)
            raise ValueError(
                f"{field} {length} is not a multiple of model.block x parallel.sp = "
                f"{self.model.block} x {self.parallel.sp}: the nearest is {near}"
            )
        if "full" in self.model.mixers() and length > self.model.full.longest:
            raise ValueError(
                f"{field} {length} is more than full attention is configured for: raise model.full.longest "
                f"({self.model.full.longest})"
            )
        if not step:
            return
        if not isinstance(self.data, DataConfig):
            raise ValueError("train.length_changes: only for text")
        lengths = set(self.train.lengths.values)
        most = _MOST_LENGTHS["masked" if self.data.documents == "masked" else "others"]
        if len(lengths) > most and self.train.slice_tokens is None:
            raise ValueError(
                f"train.length_changes: {len(lengths)} lengths with {self.data.documents} documents; at most {most}, "
                "because a GPU compiles each one separately and the compiler limits the number of graphs: use fewer, "
                "or set train.slice_tokens"
            )

    def _slices_fit(self, tokens: int, length: int) -> None:
        unit = self.model.block * self.parallel.sp
        if tokens % unit or length % tokens:
            fitting = [size for size in range(unit, length + 1, unit) if length % size == 0]
            near = min(fitting, key=lambda size: abs(size - tokens))
            raise ValueError(
                f"train.slice_tokens {tokens} must be a multiple of model.block x parallel.sp = {self.model.block} x "
                f"{self.parallel.sp} and divide train.sequence_length {length}: the nearest that does is {near}"
            )
        slices, every = self.train.slices, self.train.edges_every
        if every >= max(2, slices):
            raise ValueError(
                f"train.edges_every {every} is not below the {slices} slices of a sequence: the fewest edges are kept "
                f"with {max(1, round(slices**0.5))}"
            )
        if isinstance(self.data, LongRangeConfig):
            raise ValueError("train.slice_tokens: a task pools each example as a whole, so it has no slices")
        if "full" in self.model.mixers():
            raise ValueError(
                "train.slice_tokens: full attention sees all keys before a slice, so edges would grow with the "
                "length and memory with its square; choose another model.mixer, or a larger parallel.sp"
            )
        segment = self.model.transformer_xl.window
        if "transformer-xl" in self.model.mixers() and (tokens // self.parallel.sp) % segment:
            raise ValueError(
                f"train.slice_tokens {tokens} cuts a segment of Transformer-XL, {segment} tokens "
                "(model.transformer_xl.window), within which gradients flow: make it a multiple of "
                f"{segment * self.parallel.sp}"
            )


_MOST_LENGTHS = {"masked": 3, "others": 8}
"""Maximum number of sequence lengths in a run. A length needs up to four compiled graphs with masked documents and one
with others. A layer kind may have 16 graphs (`GRAPHS` in `model.attention.flex`), and evaluations and samples need some
more."""
NUMERIC_SECTIONS = ("seed", "model", "data", "train", "optimizer", "schedule", "branch", "initial_weights")
"""Sections of a recipe that affect a run's numbers by more than rounding. All others may change from start to start:
they set what is written, and how the run is distributed over its ranks."""
WITHOUT_EFFECT = (
    "train.micro_sequences",
    "train.slice_tokens",
    "train.edges",
    "train.edges_every",
    "train.average",
    "data.prefetch",
    "data.max_passes",
    "data.on_bad_shard",
    "data.storage",
    "data.examples",
)
"""Settings in NUMERIC_SECTIONS that have no effect on the numbers, so that they may change all the same. The path of a
corpus may change too: the loader's `load_state_dict` compares the corpus's digest with the one in the checkpoint."""


def load_recipe(given: str | Path, overrides: Iterable[str] = (), base: Path | None = None) -> Recipe:
    """Read a recipe, given by path or name, and apply overrides ``section.field=value``.

    `base`: folder that relative paths start from if the recipe has no `paths_from`; None: see `Recipe.paths_from`.
    Raises UserError when the recipe does not exist or is invalid.
    """
    path = find(given, RECIPES)
    return parse(Recipe, overridden(recipe_settings(path, base), overrides), where=str(path))


def recipe_settings(path: str | Path, base: Path | None = None) -> dict[str, Any]:
    """Read the settings in a recipe's file, without validation, and fill in `paths_from`; raises ConfigError."""
    path = Path(path)
    data = read_settings(path)
    if (path.parent / "ds_config.json").is_file():
        base = base or Path.cwd()  # in run directories of older versions, which did not store `paths_from`
    data.setdefault("paths_from", str(base or base_of(path)))
    if data["paths_from"] is not None:
        data["paths_from"] = str(path.absolute().parent / data["paths_from"])
    return data


def with_vocabulary(recipe: Recipe, corpora: Sequence[Corpus]) -> Recipe:
    """Return the recipe with the corpus's vocabulary size if it sets none; raises UserError if its own is too small."""
    if recipe.model.vocab_size is not None:
        for corpus in corpora:
            corpus.require_vocabulary(recipe.model.vocab_size)
        return recipe
    return recipe.of_vocabulary(corpora[0].manifest.tokenizer.vocab_size)


def spread_of(recipe: Recipe, world: int) -> Spread:
    """Return how the sequences of a step are divided over the ranks; raises ConfigError if a rank would have none."""
    dp = data_parallel(world, recipe.parallel.sp)
    train = recipe.train
    if (fewest := train.fewest_sequences) < dp:
        field = "train.sequences" if fewest == train.sequences else "train.sequence_changes"
        most = fewest * recipe.parallel.sp
        raise ConfigError(
            f"{dp} data-parallel ranks but only {counted(fewest, 'sequence')} per step ({field}): "
            f"use at most {counted(most, 'rank')}, or more sequences"
        )
    return Spread(train.sequences, dp, train.micro_sequences)


def deepspeed_file(recipe: Recipe) -> Path:
    """Return the path of the recipe's DeepSpeed file; raises UserError, listing where it looked, if there is none."""
    given = Path(recipe.deepspeed)
    return given if given.is_file() else find(written(recipe.deepspeed), STRATEGIES)


def digest(recipe: Recipe) -> str:
    """Return the SHA-256 of the recipe's `identity` without settings at their default.

    So a later version with more settings gives the same digest.
    """
    return hashlib.sha256(json.dumps(identity(recipe, defaults=False), sort_keys=True).encode()).hexdigest()


def differing(one: Recipe, other: Recipe) -> list[str]:
    """Return the differences between the identities of two recipes, as ``field: one's value, other's value``."""
    return differing_values(identity(one), identity(other))


def differing_values(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the differences between two mappings, as ``key: one's value, other's value``; None for a missing key."""
    return [
        f"{key}: {one.get(key)!r}, {other.get(key)!r}" for key in {**one, **other} if one.get(key) != other.get(key)
    ]


def identity(recipe: Recipe, defaults: bool = True) -> dict[str, Any]:
    """Return the settings that affect a run's numbers, by dotted name.

    `defaults`: include settings that have their default value.
    """
    data = recipe.model_dump(mode="json", include=set(NUMERIC_SECTIONS), exclude_defaults=not defaults)
    corpus = data["data"].pop("corpus", None)
    if isinstance(corpus, list):
        data["data"]["weights"] = [each.get("weight", 1.0) for each in corpus]
    return {
        name: value
        for name, value in flat(data).items()
        if not any(name == free or name.startswith(f"{free}.") for free in WITHOUT_EFFECT)
    }


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested settings by their dotted names."""
    flattened: dict[str, Any] = {}
    for key, value in data.items():
        flattened |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flattened
