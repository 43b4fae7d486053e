"""Writer to Weights & Biases: the same curves as in TensorBoard. API: https://docs.wandb.ai/ref/python/

The destination comes from W&B's environment variables: WANDB_PROJECT (default: bst), WANDB_ENTITY, and so on. With
WANDB_MODE=offline it writes into wandb/ in the run directory, for `wandb sync`. A resumed run continues the same W&B
run.

`run.log` passes the values to a separate process of W&B, which writes them to its file and survives a killed rank.
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
    """Writer to a run at W&B."""

    def __init__(self, run_dir: Path, recipe: Recipe, about: dict[str, Any]) -> None:
        super().__init__(run_dir, NAME)
        self.path = run_dir / "wandb"
        own = kept_name(run_dir, NAME) or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=recipe.name,
            id=own,
            resume="allow",
            dir=str(run_dir.absolute()),
            config=recipe.model_dump(mode="json") | about,
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True),  # the launcher keeps the output
        )
        keep_name(run_dir, NAME, own)
        self._run.define_metric("*", step_metric="step")
        self.catch_up()

    def send(self, values: dict[str, float], step: int) -> None:
        self._run.log(values | {"step": step})

    def close(self) -> None:
        self._run.finish()
        super().close()
