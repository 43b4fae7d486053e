"""The design of a sweep: its runs. Each is a complete recipe, in a directory whose name ends in the recipe's hash.

Every architecture is run on every stratum (arm, size, depth, seed), with the same order of the data, for the same
compute C = 6 N^2 m at each length m. So an architecture that needs more FLOPs per token trains on fewer tokens. The
lengths of a stratum share one trunk with a constant learning rate. For each length a branch leaves the trunk and decays
the rate.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bst_base.places import with_base
from bst_base.settings import ConfigError, parse
from bst_dist.config import Recipe, recipe_settings
from bst_dist.model.config import MIXER_SECTIONS
from bst_dist.model.layers import MIXERS
from bst_dist.study.runs.config import Settings
from bst_dist.study.runs.recipes import Job, digest, name_by_hash, with_settings
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.shape import Counts, Model, count, solve_together
from data_pipeline.serve.config import DataConfig
from data_pipeline.serve.loader import open_corpora

Role = Literal["grid", "hold-out", "audit"]


@dataclass(frozen=True)
class Cell:
    """One point of the grid. A trunk and its branches have the same cell."""

    architecture: str
    arm: str
    size: float
    depth: int
    seed: int
    role: Role = "grid"
    rate_factor: float = 1.0

    @property
    def stratum(self) -> str:
        """Arm, size, depth and seed. The runs of a pair have the same stratum and differ in the architecture."""
        return f"{self.arm}-n{self.size:.3g}-d{self.depth}-s{self.seed}"

    @property
    def label(self) -> str:
        """The first part of the names of its runs."""
        audit = f"-lr{self.rate_factor:g}" if self.role == "audit" else ""
        return f"{self.architecture}-{self.stratum}{audit}".replace("+", "")


@dataclass(frozen=True)
class Run(Job):
    """One run of the sweep."""

    cell: Cell
    counts: Counts
    multiple: float | None
    """Tokens per parameter of the design; None for a trunk, which is not a measurement."""

    @property
    def group(self) -> str:
        return self.cell.architecture

    @property
    def work(self) -> float:
        return self.own_flops

    @property
    def flops(self) -> float:
        """C: training FLOPs of all its steps, including those of the trunk."""
        return 6 * self.counts.parameters * self.tokens

    @property
    def own_flops(self) -> float:
        """Training FLOPs without the steps of the trunk."""
        return self.flops * self.steps / self.recipe.train.steps


def of_grid(runs: list[Run]) -> list[Run]:
    """Return the runs that are fitted and compared: measurements of the grid, without hold-outs and audits."""
    return [run for run in runs if run.cell.role == "grid" and run.multiple is not None]


class Designer:
    """Makes the runs of a sweep."""

    def __init__(self, sweep: SweepConfig) -> None:
        """Read the base recipe and the vocabulary size of its corpus; raises UserError if either is wrong."""
        self.sweep = sweep
        self.base: dict[str, Any] = with_settings(recipe_settings(sweep.recipe), sweep.settings)
        if self.base.get("model", {}).get("vocab_size") is None:
            corpus = open_corpora(
                parse(
                    DataConfig,
                    with_base(self.base["data"], Path(self.base["paths_from"])),
                    where=f"{sweep.recipe}: data",
                ),
                "train",
            )[0]
            self.base.setdefault("model", {})["vocab_size"] = corpus.manifest.tokenizer.vocab_size
        self.architectures = dict(_with_kernels(sweep))
        self._shapes: dict[tuple[str, float, int], dict[str, Model]] = {}
        if sweep.rules.parametrisation is not None:
            self.base["model"]["parametrisation"] = self._parametrisation()

    def cells(self) -> list[Cell]:
        """Return the whole grid in training order, then the cells of the learning-rate audit in its corners."""
        sweep = self.sweep
        cells = [
            Cell(name, arm, size, depth, seed, "hold-out" if size in sweep.hold_out else "grid")
            for size, depth in sorted(self._pairs(), reverse=sweep.order == "largest")
            for arm in sweep.arms
            for seed in sweep.seeds
            for name in self.architectures
        ]
        return cells + [
            replace(cell, role="audit", rate_factor=factor)
            for cell in cells
            for factor in sweep.audit.factors
            if cell.arm in (sweep.audit.arms or sweep.arms)
            and cell.size in (min(sweep.sizes), max(sweep.sizes))
            and cell.depth in (min(sweep.depths), max(sweep.depths))
            and cell.seed in sweep.seeds[: sweep.audit.seeds]
        ]

    def runs(self, cells: list[Cell]) -> list[Run]:
        """Return the runs of these cells, each trunk before its branches. An audit has only the shortest length."""
        return [run for cell in cells for run in self._runs_of(cell)]

    def _parametrisation(self) -> dict[str, Any]:
        """Return `model.parametrisation` by the sweep's rule. The base of CompleteP is the least width and depth.

        So every model is at least as wide and as deep as the base. Transfer of the rate is known in this direction.
        """
        sweep = self.sweep
        if sweep.rules.parametrisation == "standard":
            return {"kind": "standard"}
        widths = [
            self._shape(Cell(sweep.baseline, arm, size, depth, 0)).width
            for size, depth in self._pairs()
            for arm in sweep.arms
        ]
        return {"kind": "completep", "base_width": min(widths), "base_depth": min(d for _, d in self._pairs())}

    def _pairs(self) -> list[tuple[float, int]]:
        """Return all pairs of size and depth of the sweep."""
        sweep = self.sweep
        pairs = sweep.only or [(size, depth) for size in (*sweep.sizes, *sweep.hold_out) for depth in sweep.depths]
        return list(dict.fromkeys(map(tuple, pairs)))

    def _shape(self, cell: Cell) -> Model:
        """Return the shape of a cell. The shapes of all architectures are solved together, so that sizes are equal."""
        key = (cell.arm, cell.size, cell.depth)
        if key not in self._shapes:
            bases = {}
            for name in self.architectures:
                data = self._recipe_of(replace(cell, architecture=name))
                bases[name] = (data["model"], data["train"]["sequence_length"])
            self._shapes[key] = solve_together(bases, self.sweep.shape, cell.size, cell.depth)
        return self._shapes[key][cell.architecture]

    def _recipe_of(self, cell: Cell) -> dict[str, Any]:
        """Return the base recipe with the settings of the cell's arm and architecture."""
        return with_settings(with_settings(self.base, self.sweep.arms[cell.arm]), self.architectures[cell.architecture])

    def _runs_of(self, cell: Cell) -> Iterator[Run]:
        sweep, data = self.sweep, self.base_of(cell)
        length = data["train"]["sequence_length"]
        if named := [name for name in ("length_changes", "sequence_changes") if data["train"].get(name)]:
            raise ConfigError(f"train.{named[0]}: a sweep needs the same number of tokens in every step: leave it out")
        model = self._shape(cell).config(data["model"], sweep.shape, cell.depth)
        counts = count(model, length)
        data["model"] = model.model_dump(mode="json", exclude_unset=True)
        step_flops = 6 * counts.parameters * data["train"]["sequences"] * length
        multiples = sorted(sweep.tokens_per_parameter)[: 1 if cell.role == "audit" else None]
        steps = {m: max(2, round(6 * cell.size**2 * m / step_flops)) for m in multiples}
        if len(set(steps.values())) < len(steps):
            each = ", ".join(f"{m:g}: {s}" for m, s in steps.items())
            raise ConfigError(
                f"{cell.label}: two values of tokens_per_parameter give the same number of steps ({each}): choose "
                "values further apart, or a smaller train.sequences"
            )
        leaves = {m: s - max(1, round(sweep.rules.decay_fraction * s)) for m, s in steps.items()}
        warmup = max(1, round(sweep.rules.warmup_fraction * steps[multiples[0]]))
        data["schedule"] = {**data.get("schedule", {}), "kind": "wsd", "warmup_steps": warmup}
        if len(multiples) == 1:
            yield self._finished(cell, data, counts, steps[multiples[0]], multiples[0], None)
            return
        trunk = self._trunk(cell, data, counts, leaves)
        yield trunk
        for multiple in multiples:
            branch = {"run": f"../{trunk.name}", "step": leaves[multiple]}
            yield self._finished(cell, {**data, "branch": branch}, counts, steps[multiple], multiple, trunk.name)

    def _trunk(self, cell: Cell, data: dict[str, Any], counts: Counts, leaves: dict[float, int]) -> Run:
        data = copy.deepcopy(data)
        data["train"]["steps"] = max(leaves.values())
        data["schedule"]["decay_fraction"] = 0.0
        data["checkpoint"] = {**data.get("checkpoint", {}), "at": sorted(set(leaves.values())), "keep_last": 1}
        return Run(name_by_hash(f"{cell.label}-trunk", data), None, cell, counts, None)

    def _finished(
        self, cell: Cell, data: dict[str, Any], counts: Counts, steps: int, multiple: float, trunk: str | None
    ) -> Run:
        data = copy.deepcopy(data)
        data["train"]["steps"] = steps
        # The fraction is computed from the steps, so that the decay begins exactly at the branch.
        left = steps - data["branch"]["step"] if trunk else max(1, round(self.sweep.rules.decay_fraction * steps))
        data["schedule"]["decay_fraction"] = left / steps
        data["checkpoint"] = {**data.get("checkpoint", {}), "keep_last": 1}
        return Run(name_by_hash(f"{cell.label}-m{multiple:g}", data), trunk, cell, counts, multiple)

    def base_of(self, cell: Cell) -> dict[str, Any]:
        """Return the base recipe with the cell's settings and the rules for its size."""
        sweep, smallest = self.sweep, min(self.sweep.sizes)
        data = self._recipe_of(cell)
        data["seed"] = cell.seed
        growth = cell.size / smallest
        train, optimizer = data["train"], data.setdefault("optimizer", {})
        # If the ranks divide the base batch, they divide this one too. With 181 sequences on 8 ranks, 3 of 184 rows
        # would only be padding.
        whole = ranks if train["sequences"] % (ranks := data.get("ranks") or 1) == 0 else 1
        wanted = train["sequences"] * growth**sweep.rules.batch_exponent
        train.setdefault("micro_sequences", train["sequences"])
        train["sequences"] = whole * max(1, round(wanted / whole))
        rate = parse(Recipe, _complete(data), where=sweep.recipe).optimizer.learning_rate
        optimizer["learning_rate"] = rate * cell.rate_factor * growth**-sweep.rules.rate_exponent
        return data


def _with_kernels(sweep: SweepConfig) -> Iterator[tuple[str, Settings]]:
    """Yield the architectures; those with an SSM once per kernel."""
    for name, settings in sweep.architectures.items():
        mixer = settings.get("model.mixer")
        if mixer not in MIXERS:
            raise ConfigError(f"architectures.{name}: model.mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
        if not sweep.kernels or "ssm" not in MIXER_SECTIONS[mixer]:
            yield name, settings
            continue
        for kernel, own in sweep.kernels.items():
            yield f"{name}+{kernel}", {**settings, **own}


def require_different(runs: list[Run]) -> None:
    """Raise ConfigError if two architectures have the same recipe, because their gap would always be 0."""
    seen: dict[str, str] = {}
    for run in runs:
        # The name of a branch's trunk is left out: it differs even between equal recipes.
        name = seen.setdefault(digest(run.recipe.model_copy(update={"branch": None})), run.cell.architecture)
        if name != run.cell.architecture:
            raise ConfigError(f"architectures {name} and {run.cell.architecture} are the same recipe")


def _complete(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` with placeholders for the settings that the design decides, so that the others can be checked."""
    model = {"width": 64, "heads": 1, "ffn": 64, "depth": 1, **data["model"], "placement": "all"}
    return {**data, "name": "unnamed", "model": model, "train": {**data["train"], "steps": 1}}
