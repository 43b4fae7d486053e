"""Weights & Biases: the same curves as TensorBoard's. https://docs.wandb.ai/ref/python/

W&B's own variables say where it goes: WANDB_PROJECT (bst, where it is not set), WANDB_ENTITY, WANDB_MODE=offline, which
writes into the run directory's wandb/ for `wandb sync`, and so on. A resumed run continues the same W&B run.

`run.log` hands the values to a process of W&B's own, which outlives a rank that is killed, and writes them to its file.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import wandb

from bst_dist.config import Recipe
from bst_dist.report.services import Service, keep_name, kept_name

NAME, PROJECT = "wandb", "bst"


class WeightsAndBiases(Service):
    """A run at W&B."""

    def __init__(self, run_dir: Path, recipe: Recipe, about: dict[str, Any]) -> None:
        super().__init__(run_dir, NAME)
        self.path = run_dir / "wandb"
        own = kept_name(run_dir, NAME) or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=recipe.name, id=own, resume="allow",
            dir=str(run_dir.absolute()), config=recipe.model_dump(mode="json") | about, allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),  # what a run prints is its launcher's to keep
        )  # fmt: skip
        keep_name(run_dir, NAME, own)
        self._run.define_metric("*", step_metric="step")
        self.catch_up()

    def send(self, values: dict[str, float], step: int) -> None:
        self._run.log(values | {"step": step})

    def close(self) -> None:
        self._run.finish()
        super().close()
