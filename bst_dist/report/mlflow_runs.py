"""Writer to MLflow: the same curves as in TensorBoard.

API: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html. The destination comes from MLflow's
environment variables: MLFLOW_TRACKING_URI (default: mlflow.db in the working directory) and MLFLOW_EXPERIMENT_NAME
(default: bst). A resumed run continues the same MLflow run. If the same step of a metric is sent twice, MLflow keeps
both values and cannot replace them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunStatus
from mlflow.tracking import MlflowClient

from bst_dist.config import Recipe, flat
from bst_dist.report.services import Service, keep_name, kept_name

NAME, EXPERIMENT = "mlflow", "bst"
PARAMETERS_AT_ONCE = 100
"""Most parameters that one request of MLflow's REST API accepts."""


class MLflow(Service):
    """Writer to a run at an MLflow server, or in MLflow's local store."""

    def __init__(self, run_dir: Path, recipe: Recipe, about: dict[str, Any]) -> None:
        super().__init__(run_dir, NAME)
        self._client = MlflowClient()
        if own := kept_name(run_dir, NAME):
            self._id = own
            self._client.update_run(own, status=RunStatus.to_string(RunStatus.RUNNING))
        else:
            self._id = self._create(recipe.name, flat(recipe.model_dump(mode="json")) | about)
            keep_name(run_dir, NAME, self._id)
        self.catch_up()

    def send(self, values: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)
        super().close()

    def _create(self, name: str, parameters: dict[str, Any]) -> str:
        """Create a run with these parameters; return its id."""
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(wanted)
        number = experiment.experiment_id if experiment else self._client.create_experiment(wanted)
        own = self._client.create_run(number, run_name=name).info.run_id
        said = [Param(key, str(value)) for key, value in parameters.items()]
        for at in range(0, len(said), PARAMETERS_AT_ONCE):
            self._client.log_batch(own, params=said[at : at + PARAMETERS_AT_ONCE])
        return own
