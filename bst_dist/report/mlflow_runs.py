"""MLflow: the same curves as TensorBoard's. https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html

MLflow's own variables say where they go: MLFLOW_TRACKING_URI (mlflow.db in the working directory, where it is not set),
MLFLOW_EXPERIMENT_NAME (bst). A resumed run continues the same MLflow run. Of a step that is taken again it keeps the
first values: MLflow takes a metric's step twice, and has no way to replace it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunStatus
from mlflow.tracking import MlflowClient

from bst_dist.config import Recipe, flat
from bst_dist.report.metrics import Report, Seen, Writer
from bst_dist.report.writers import Once, keep_name, kept_name, scalars

NAME, EXPERIMENT = "mlflow", "bst"
PARAMETERS_AT_ONCE = 100
"""That one request takes, by MLflow's REST API."""


class MLflow(Writer):
    """A run at an MLflow server, or in its local store."""

    def __init__(self, run_dir: Path, recipe: Recipe, about: dict[str, Any]) -> None:
        self._client = MlflowClient()
        self._once = Once(run_dir, NAME)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        if own := kept_name(run_dir, NAME):
            self._id = own
            self._client.update_run(own, status=RunStatus.to_string(RunStatus.RUNNING))
            return
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=recipe.name).info.run_id
        keep_name(run_dir, NAME, self._id)
        said = [Param(key, str(value)) for key, value in (flat(recipe.model_dump(mode="json")) | about).items()]
        for at in range(0, len(said), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=said[at : at + PARAMETERS_AT_ONCE])

    def write(self, report: Report) -> None:
        if self._once.first(report):
            self._log(scalars(report), report.step)

    def see(self, seen: Seen) -> None:
        if self._once.first(seen):
            self._log(seen.scalars, seen.step)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _log(self, values: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        if values:
            self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])
