"""pack.json, the description of a packed folder. Packing writes it, and the training machine reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bst_base.files import write_text
from bst_base.settings import parse
from bst_dist.config import Recipe
from bst_dist.study.runs.recipes import Job
from bst_dist.study.sweep.collect import known_columns
from bst_dist.study.sweep.design import Run

PACK = "pack.json"
SIDE_BY_SIDE = 6
"""Number of parallel runs on one GPU. A single small model leaves it mostly idle between kernels."""


@dataclass(frozen=True)
class Packed(Job):
    """One run of a packed folder."""

    known: dict[str, Any] | None
    """The columns of its row that are known before training; None for a trunk, which is not a measurement."""
    own_flops: float
    architecture: str

    @property
    def group(self) -> str:
        return self.architecture

    @property
    def work(self) -> float:
        return self.own_flops


@dataclass(frozen=True)
class Pack:
    """The contents of pack.json."""

    name: str
    versions: dict[str, str]
    """Versions of the software that made the folder."""
    retries: int
    minutes: float
    """Planned training time in minutes, as the sum of all calls of run.sh."""
    expected: int
    """Number of runs that are expected to finish in this time."""
    runs: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write pack.json."""
        write_text(folder / PACK, json.dumps(asdict(self)) + "\n")

    def jobs(self, paths_from: Path) -> list[Packed]:
        """Return the runs to train. The paths of corpora and DeepSpeed files are relative to `paths_from`."""
        return [
            Packed(
                parse(Recipe, {**run["recipe"], "paths_from": str(paths_from)}, where=run["recipe"]["name"]),
                run["trunk"],
                run["known"],
                run["own_flops"],
                run["architecture"],
            )
            for run in self.runs
        ]


def read_pack(folder: Path) -> Pack:
    """Read the pack.json of a folder."""
    return Pack(**json.loads((folder / PACK).read_text(encoding="utf-8")))


def described(runs: Sequence[Run], recipes: dict[str, dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Return the entries of `Pack.runs`; `recipes` is run name -> the recipe for the other machine."""
    base = {run.cell.stratum: run.counts.parameters for run in runs if run.cell.architecture == baseline}
    return [
        {
            "recipe": recipes[run.name],
            "trunk": run.trunk,
            "own_flops": run.own_flops,
            "architecture": run.cell.architecture,
            "known": None if run.multiple is None else known_columns(run, base[run.cell.stratum]),
        }
        for run in runs
    ]
