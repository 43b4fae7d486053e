"""Weights & Biases: the same curves as TensorBoard's. https://docs.wandb.ai/ref/python/

W&B's own variables say where it goes: WANDB_PROJECT (bst, where it is not set), WANDB_ENTITY, WANDB_MODE=offline, which
writes into the run directory's wandb/ for `wandb sync`, and so on. A resumed run continues the same W&B run. Of a step
that is taken again after a resume W&B keeps the first values, as it does by itself for a step that it has.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import wandb

from bst_dist.config import Recipe
from bst_dist.report.metrics import Report, Seen, Writer
from bst_dist.report.writers import Once, keep_name, kept_name, scalars

NAME, PROJECT = "wandb", "bst"


class WeightsAndBiases(Writer):
    """A run at W&B."""

    def __init__(self, run_dir: Path, recipe: Recipe, about: dict[str, Any]) -> None:
        self.path = run_dir / "wandb"
        self._once = Once(run_dir, NAME)
        own = kept_name(run_dir, NAME) or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=recipe.name, id=own, resume="allow",
            dir=str(run_dir.absolute()), config=recipe.model_dump(mode="json") | about, allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),  # what a run prints is its launcher's to keep
        )  # fmt: skip
        keep_name(run_dir, NAME, own)
        self._run.define_metric("*", step_metric="step")

    def write(self, report: Report) -> None:
        if self._once.first(report) and (values := scalars(report)):
            self._run.log(values | {"step": report.step})

    def see(self, seen: Seen) -> None:
        if seen.scalars and self._once.first(seen):
            self._run.log(seen.scalars | {"step": seen.step})

    def close(self) -> None:
        self._run.finish()
